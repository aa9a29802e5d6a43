from tests.databases import empty_database, with_database

__all__ = ["empty_database", "with_database"]
