from tests.databases import empty_database, prefect_home, with_database

__all__ = ["empty_database", "prefect_home", "with_database"]
