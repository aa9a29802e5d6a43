"""What DVC knows: the stages, what each waits for, which are stale. The only user of DVC's internal API."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ffprune.core.errors import MissingInput, ParameterError
from ffprune.stages.environment import in_time

if TYPE_CHECKING:
    from dvc.repo import Repo

_MEND = "mount or start it, check credentials, or dvc remote modify"


@dataclass(frozen=True)
class Plan:
    """The stages of one execution.

    Attributes:
        upstream: stage -> the stages it waits for; the keys stand in an order in which they can run.
        stale: stages whose own inputs, parameters, code or outputs changed.
    """

    upstream: dict[str, tuple[str, ...]]
    stale: frozenset[str]


def read_plan(root: Path, targets: Sequence[str] = ()) -> Plan:
    """Read dvc.yaml and the workspace's state; ``targets`` limits both to these stages and what they need.

    Without targets the stages are those of the current folder's dvc.yaml, as ``dvc repro`` takes them: a project's run
    leaves its studies alone, and a study's run the project.

    Raises:
        ParameterError: a target is no stage.
        MissingInput: the folder lies in no DVC repository, or in no git repository and DVC was not told so.
    """
    import networkx as nx

    with _opened(root) as repo:
        # What `dvc add` made is data, not a stage. An edge u -> v says that u depends on v, so post-order puts v first.
        graph = repo.index.graph.subgraph([node for node in repo.index.graph if not node.is_data_source])
        order = [node.addressing for node in nx.dfs_postorder_nodes(graph)]
        upstream = {n.addressing: tuple(v.addressing for v in graph.successors(n)) for n in graph.nodes}
        stale = set(repo.status())
    # DVC names the stages of other folders PATH:NAME.
    wanted = _with_ancestors(targets or [name for name in order if ":" not in name], upstream)
    return Plan({n: upstream[n] for n in order if n in wanted}, frozenset(stale & wanted))


@dataclass(frozen=True)
class Unreached:
    """Why a remote has nothing to give.

    Attributes:
        found: how it is.
        mend: what to do.
        new: nothing is wrong that a first push does not mend.
    """

    found: str
    mend: str
    new: bool = False


def reach_remotes(root: Path, seconds: float) -> dict[str, Unreached | None]:
    """Ask every remote of the repository whether it is there: name -> what is wrong, None when nothing is.

    Args:
        root: the repository.
        seconds: to wait for each.
    """
    with _opened(root) as repo:
        return {name: _reach(repo, name, seconds) for name in repo.config["remote"]}


def _reach(repo: Any, name: str, seconds: float) -> Unreached | None:
    try:
        return in_time(partial(_look, repo, name), seconds)
    except ImportError as error:
        # DVC: ssh is supported, but requires 'dvc-ssh' to be installed
        lacking = re.search(r"'dvc-(\w+)'", str(error))
        named = f"dvc[{lacking[1]}]" if lacking else "dvc[all]"
        return Unreached(str(error), f"pip install '{named}', into the environment that runs ffprune")
    except TimeoutError as error:
        return Unreached(str(error), _MEND)
    except Exception as error:
        return Unreached(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", _MEND)


def _look(repo: Any, name: str) -> Unreached | None:
    remote = repo.cloud.get_remote(name)
    if remote.fs.exists(remote.path):
        return None
    if remote.fs.protocol == "local":
        above = next(place for place in Path(remote.path).parents if place.exists())
        if not os.access(above, os.W_OK):
            return Unreached(f"{remote.path} is not there, and {above} cannot be written", _MEND)
    return Unreached(
        f"{remote.path} is not there yet: the first push makes it", f"if results should be there: {_MEND}", new=True
    )


def cache_folder(root: Path) -> Path:
    """Where DVC's cache is.

    Raises:
        MissingInput: as :func:`read_plan`.
    """
    with _opened(root) as repo:
        return Path(repo.cache.legacy.path)


@contextmanager
def _opened(root: Path) -> Iterator[Repo]:
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo
    from dvc.scm import SCMError

    try:
        repo = Repo(str(root), _wait_for_lock=True)
    except NotDvcRepoError as error:
        raise MissingInput(
            f"the pipeline was to be read in {root.absolute()}",
            "neither that folder nor one above it is a DVC repository",
            "change to the project's folder or to a study in it (or make one: dvc init)",
        ) from error
    except SCMError as error:
        raise MissingInput(
            f"the pipeline was to be read in {root}",
            f"DVC says: {error}",
            "clone the project with git; or, for a copy of its files, 'dvc config --local core.no_scm true'",
        ) from error
    with repo:
        yield repo


def _with_ancestors(targets: Sequence[str], upstream: dict[str, tuple[str, ...]]) -> set[str]:
    for target in targets:
        if target not in upstream:
            raise ParameterError(
                f"the stage '{target}' was asked for",
                f"dvc.yaml has {', '.join(upstream)}",
                "name one of these stages",
            )
    found: set[str] = set()
    waiting = list(targets)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(upstream[name])
    return found
