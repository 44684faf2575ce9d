"""The model repository: what its files say is loaded, watched, replaced and unloaded while the gateway serves.

A version is loaded in this order: its directory is copied, its configuration is held against what the ONNX file says
of itself, every executor opens and warms up the copy beside what it runs (`Engine.keep`), and only then requests reach
it, in the same moment as the versions that it replaces stop getting them. Whatever fails on this way is the reason in
the index and in the log, and what was served before goes on.

Three modes, as in Triton: `none` loads what is there at the start, `poll` looks again every few seconds, `explicit`
loads what it is told to.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from rtml.errors import RowsDepend, RtmlError
from rtml.metrics import Target
from rtml.serving import modelconfig, modelfiles, modelsource
from rtml.serving.engine import Engine, Prepared
from rtml.serving.http import HttpError
from rtml.serving.modelconfig import ModelConfig
from rtml.serving.modelfiles import Copies, Copy, Found, Stamp
from rtml.serving.registry import ModelVersion, Registry, version_order
from rtml.serving.sequences import Family, Stateful
from rtml.serving.statefulmodels import make
from rtml.settings import HttpSettings

_logger = logging.getLogger("rtml.serving")

#: The name under which the repository's models are counted.
APP: Final = "repository"
#: Seconds that the gateway is not ready because of models that are still being loaded.
_START_TIMEOUT: Final = 60.0


class RepositorySettings(NamedTuple):
    """What a repository is and does."""

    directories: tuple[Path, ...]
    control: Literal["none", "poll", "explicit"] = "none"
    #: Seconds between two looks at the files.
    poll_secs: float = 5.0
    #: Loaded at the start in explicit mode; "*": all.
    load_models: tuple[str, ...] = ()
    #: Load requests may bring files.
    uploads: bool = False
    #: Where copies lie; None: a directory of our own.
    cache: Path | None = None
    #: Of the files of one version.
    bytes_max: int = 8 << 30

    @classmethod
    def of(cls, settings: HttpSettings) -> RepositorySettings:
        """What the command line says.

        Raises:
            ValueError: a repository is no directory.
        """
        directories = tuple(Path(place) for place in settings.model_repository)
        for directory in directories:
            if not directory.is_dir():
                raise ValueError(f"--model-repository: {directory} is no directory")
        return cls(
            directories,
            settings.model_control,
            settings.repository_poll_secs,
            settings.load_model,
            settings.allow_model_upload,
            Path(settings.model_cache).absolute() if settings.model_cache else None,
            settings.model_bytes_max,
        )


class _Live(NamedTuple):
    """A version that is served, and from what."""

    model: ModelVersion
    stamp: tuple[Stamp, Stamp]
    copy: Copy


class ModelRepository:
    """Everything here belongs to the gateway's event loop; files are read in threads.

    Args:
        engine: Runs the models.
        registry: Gets them.
        target: The counters of a model.
        settings: What to do.
    """

    def __init__(
        self, engine: Engine, registry: Registry, target: Callable[[str], Target], settings: RepositorySettings
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._target = target
        self._settings = settings
        self._copies = Copies(settings.cache, settings.bytes_max)
        self._live: dict[str, dict[str, _Live]] = {}
        #: What each model was brought in line with last; what failed is not tried again before it changes.
        self._done: dict[str, Found | None] = {}
        #: Versions about whose failure the registry was told.
        self._marked: dict[str, set[str]] = {}
        #: Models that are being loaded because of what is in the repository, and what that is.
        self._renewals: dict[str, tuple[asyncio.Task[Any], Found | None]] = {}
        self._seen: dict[str, Found] = {}
        self._wrong: dict[str, str] = {}
        #: One load or unload of a model at a time.
        self._locks: dict[str, asyncio.Lock] = {}
        self._uploaded: dict[str, Path] = {}
        #: Versions with state of each model.
        self._families: dict[str, Family] = {}
        #: Versions that are not served any more, and still have sequences.
        self._drains: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None
        #: What was there at the start is loaded, or has failed.
        self.started = asyncio.Event()

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load; `started` is set when that is done."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="model repository")

    async def stop(self) -> None:
        """Load nothing more. What is served stays so until the engine ends."""
        tasks = [task for task, _ in self._renewals.values()]
        if self._task is not None:
            tasks.append(self._task)
            self._task = None
        tasks += self._drains
        for versions in self._live.values():
            for one in versions.values():
                if one.model.stateful is not None:
                    await one.model.stateful.leave()
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._copies.close()
        for path in self._uploaded.values():
            shutil.rmtree(path, ignore_errors=True)

    async def _run(self) -> None:
        control = self._settings.control
        await self._look(first=True)
        # A model that waits for an executor which is not there yet must not keep all others from being served.
        if self._renewals:
            await asyncio.wait([task for task, _ in self._renewals.values()], timeout=_START_TIMEOUT)
        self.started.set()
        while control == "poll":
            await asyncio.sleep(self._settings.poll_secs)
            await self._look(first=False)

    async def _look(self, first: bool) -> None:
        """Compare what is there with what was there, and act on what has settled."""
        settings = self._settings
        try:
            found, wrong = await asyncio.to_thread(modelfiles.scan, settings.directories)
        except OSError as error:
            _logger.error("the model repository cannot be read: %s", error)
            return
        for name, reason in wrong.items():
            if self._wrong.get(name) != reason:
                _logger.error("model %s: %s", name, reason)
                self._registry.mark(name, "", "UNAVAILABLE", reason)
        for name in self._wrong.keys() - wrong.keys():
            self._registry.unmark(name, "")
        self._wrong = wrong
        before, self._seen = self._seen, found
        if settings.control == "explicit":
            wanted = set(found) if "*" in settings.load_models else set(settings.load_models)
            for name in wanted - found.keys():
                self._registry.mark(name, "", "UNAVAILABLE", "it is not in the repository")
            wanted &= found.keys()
        else:
            # What is served of a model whose directory is in doubt goes on.
            wanted = (set(found) | self._live.keys()) - wrong.keys()
        # A half-copied file changes between two looks.
        settled = [name for name in sorted(wanted) if first or before.get(name) == found.get(name)]
        for name in settled:
            self._renew_beside(name, found.get(name))

    def _renew_beside(self, name: str, found: Found | None) -> None:
        """Bring a model in line with its directory, in a task of its own."""
        task, wanted = self._renewals.get(name, (None, None))
        if task is not None:
            if wanted == found:
                return
            task.cancel()  # what it loads is not what is there now
        elif name in self._done and self._done[name] == found:
            return
        task = asyncio.get_running_loop().create_task(self._renew(name, found), name=f"load {name}")
        self._renewals[name] = task, found

        def done(task: asyncio.Task[Any]) -> None:
            if self._renewals.get(name, (None,))[0] is task:
                del self._renewals[name]
            if not task.cancelled() and (error := task.exception()) is not None:
                _logger.error("model %s", name, exc_info=error)

        task.add_done_callback(done)

    # --- what requests ask for ----------------------------------------------------------------------------------------

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Load a model's versions anew; returns when they are served.

        Args:
            name: The model.
            parameters: Of the request: "config" (JSON text) takes the place of the model's own configuration,
                "file:<version>/<file>" (base64 text, or bytes) brings files, which are loaded instead of those in the
                repository.

        Raises:
            HttpError: it cannot be loaded, and why; what was served before still is.
        """
        self.check_allowed()
        try:
            config = modelsource.override(parameters)
            files = {
                key.removeprefix(modelsource.FILE): value
                for key, value in parameters.items()
                if key.startswith(modelsource.FILE)
            }
            found: Found | None
            if files:
                found = await asyncio.to_thread(self._upload, name, config, files)
            else:
                found = await asyncio.to_thread(self._find, name)
        except (ValueError, OSError) as error:
            raise HttpError(400, f"failed to load {name!r}: {error}", "LoadFailed") from None
        if found is None:
            raise HttpError(404, f"failed to load {name!r}: it is not in the repository", "UnknownModel")
        self._cancel(name)
        problems = await self._renew(name, found, config)
        if problems:
            reasons = "; ".join(f"version {version}: {reason}" if version else reason for version, reason in problems)
            raise HttpError(400, f"failed to load {name!r}: {reasons}", "LoadFailed")

    async def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Serve a model no more; requests that run go on.

        Args:
            name: The model.
            unload_dependents: Nothing depends on a model here: graph programs find at run time what there is.

        Raises:
            HttpError: it is not known, or not the repository's.
        """
        self.check_allowed()
        if name not in self._live and name not in self._seen:
            raise HttpError(404, f"failed to unload {name!r}: it is no model of the repository", "UnknownModel")
        self._cancel(name)
        async with self._lock(name):
            self._retire(name, "unloaded")

    def _cancel(self, name: str) -> None:
        """What is being loaded because it lies in the repository is not to be loaded any more."""
        if name in self._renewals:
            self._renewals[name][0].cancel()

    def check_allowed(self) -> None:
        """Whether requests may load and unload.

        Raises:
            HttpError: they may not.
        """
        if self._settings.control != "explicit":
            # Triton's words, which programs look for, and its status.
            message = (
                "explicit model load / unload is not allowed: models are loaded and unloaded by request only with "
                f"--model-control explicit, and this gateway runs with {self._settings.control!r}"
            )
            raise HttpError(503, message, "NotAllowed", headers={})

    def _find(self, name: str) -> Found | None:
        found, wrong = modelfiles.scan(self._settings.directories)
        if name in wrong:
            raise ValueError(wrong[name])
        return found.get(name)

    def _upload(self, name: str, config: ModelConfig | None, files: dict[str, Any]) -> Found:
        """The files of a load request as a model's directory."""
        if not self._settings.uploads:
            raise ValueError("files in load requests are not allowed: start with --allow-model-upload")
        if config is None:
            raise ValueError("files need the parameter 'config' beside them")
        if not modelfiles.valid_name(name):
            raise ValueError("a model's name has letters, digits, '.', '_' and '-' only")
        root = Path(tempfile.mkdtemp(prefix=".upload-", dir=self._copies.directory))
        try:
            for place, content in files.items():
                path = modelfiles.inside(root, place)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(modelsource.bytes_of(place, content))
            found = modelfiles.look(root)
        except BaseException:
            shutil.rmtree(root, ignore_errors=True)
            raise
        before = self._uploaded.pop(name, None)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        self._uploaded[name] = root
        return found

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())

    # --- one model ----------------------------------------------------------------------------------------------------

    async def _renew(
        self, name: str, found: Found | None, override: ModelConfig | None = None
    ) -> list[tuple[str, str]]:
        """Serve what the model's directory says. Returns what could not be loaded, each (version, reason)."""
        async with self._lock(name):
            registry = self._registry
            if name in registry.names() and registry.find(name).app != APP:
                _logger.error("the model repository's %s is not loaded: an app serves a model of that name", name)
                return [("", "an app serves a model of that name")]
            self._done[name] = found
            if found is None:
                self._retire(name, "")
                return []
            live = self._live.setdefault(name, {})
            try:
                config = override or await asyncio.to_thread(modelsource.config_of, name, found)
            except (OSError, ValueError) as error:
                return self._problem(name, "", modelsource.reason_of(error))
            chosen = (config or ModelConfig()).chosen(list(found.versions))
            for absent in (config or ModelConfig()).missing(list(found.versions)):
                _logger.error("model %s: its version_policy names version %d, which has no directory", name, absent)
            if not chosen:
                reason = "it has no version directory" if not found.versions else "the version policy chooses none"
                self._retire(name, reason)
                return self._problem(name, "", reason)
            self._unmark(name, {"", *self._marked.get(name, ())} - set(chosen))
            source = modelsource.Source(found, config, override is not None)
            problems = []
            ready: list[_Live] = []
            for version in chosen:
                stamp = (found.stamp, found.versions[version])
                if override is None and version in live and live[version].stamp == stamp:
                    continue
                try:
                    ready.append(await self._load(name, version, source))
                except (OSError, ValueError, RtmlError) as error:
                    problems += self._problem(name, version, modelsource.reason_of(error))
            self._flip(name, ready, chosen)
            return problems

    def _problem(self, name: str, version: str, reason: str) -> list[tuple[str, str]]:
        still = ", the version before goes on" if self._live.get(name) else ""
        _logger.error("model %s%s is not loaded%s: %s", name, f", version {version}," if version else "", still, reason)
        self._registry.mark(name, version, "UNAVAILABLE", reason)
        self._marked.setdefault(name, set()).add(version)
        return [(version, reason)]

    def _unmark(self, name: str, versions: set[str]) -> None:
        """There is nothing to be said of these versions any more."""
        for version in versions:
            self._registry.unmark(name, version)
            self._marked.get(name, set()).discard(version)

    async def _load(self, name: str, version: str, source: modelsource.Source) -> _Live:
        """A version that executors have ready.

        Raises:
            OSError, ValueError, RtmlError: it cannot be loaded.
        """
        found = source.found
        self._registry.mark(name, version, "LOADING")
        self._marked.setdefault(name, set()).add(version)
        copy = await self._take(found.path / version)
        try:
            model, executors = await self._open(name, version, source, copy)
        except BaseException as error:
            await asyncio.shield(asyncio.to_thread(self._copies.give_back, copy))
            if isinstance(error, RtmlError):  # executors name the file; clients, who are told the reason, need no path
                raise ValueError(str(error).replace(f"{copy.path}/", "").replace(str(copy.path), ".")) from None
            raise
        _logger.info("model %s, version %s, is ready in %d executors", name, version, executors)
        return _Live(model, (found.stamp, found.versions[version]), copy)

    async def _open(self, name: str, version: str, source: modelsource.Source, copy: Copy) -> tuple[ModelVersion, int]:
        """A version, and how many executors have it ready."""
        plan, function, labels = await asyncio.to_thread(modelsource.prepare, name, copy, source)
        prepared = self._engine.prepare(function)
        model = self._version(name, version, plan, function, prepared, labels)
        if plan.layout is not None:
            family = self._families.setdefault(name, Family())
            await make(self._engine, model, plan.layout, family).open()
            return model, plan.layout.holders
        try:
            return model, await self._engine.keep(prepared)
        except RowsDepend as error:
            _logger.info("model %s, version %s: each request runs alone: %s", name, version, error)
        return await self._open(name, version, source._replace(joins=False), copy)

    def _version(
        self,
        name: str,
        version: str,
        plan: modelconfig.Plan,
        function: Any,
        prepared: Prepared,
        labels: modelsource.Labels,
    ) -> ModelVersion:
        return ModelVersion(
            name=name,
            version=version,
            function=function,
            prepared=prepared,
            inputs=plan.inputs,
            outputs=plan.outputs,
            platform=modelconfig.PLATFORM,
            target=self._target(name),
            batch_max=plan.batch_max,
            config=plan.config,
            deadline=plan.deadline,
            labels=labels,
            app=APP,
        )

    async def _take(self, directory: Path) -> Copy:
        taking = asyncio.get_running_loop().run_in_executor(None, self._copies.take, directory)
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            taking.add_done_callback(self._give_back_taken)
            raise

    def _give_back_taken(self, taken: asyncio.Future[Copy]) -> None:
        if taken.exception() is None:
            self._copies.give_back(taken.result())

    def _flip(self, name: str, ready: list[_Live], chosen: list[str]) -> None:
        """From this moment on the new versions are served, and what is not chosen any more is not."""
        live = self._live[name]
        # While nothing of what is wanted works, what worked stays.
        works = any(version in live for version in chosen) or bool(ready)
        gone = [version for version in live if version not in chosen] if works else []
        replaced = [live[one.model.version] for one in ready if one.model.version in live]
        for one in ready:
            live[one.model.version] = one
            self._marked[name].discard(one.model.version)
            last = one is ready[-1]
            self._registry.add(one.model, retire=gone if last else ())
        for old in replaced:
            self._let_go(old)
        for version in gone:
            old = live.pop(version)
            if not ready:
                self._registry.remove(name, version)
            self._let_go(old)

    def _retire(self, name: str, reason: str) -> None:
        """Serve the model no more; without a reason nothing is left to be said of it."""
        live = self._live.pop(name, {})
        self._unmark(name, {"", *self._marked.pop(name, ())})
        for version in sorted(live, key=version_order):
            self._registry.remove(name, version)
            if reason:
                self._registry.mark(name, version, "UNAVAILABLE", reason)
                self._marked.setdefault(name, set()).add(version)
            self._let_go(live[version])
            _logger.info("model %s, version %s: %s", name, version, reason or "removed from the repository")

    def _let_go(self, old: _Live) -> None:
        if old.model.stateful is not None:
            task = asyncio.get_running_loop().create_task(self._drain(old, old.model.stateful), name="drain sequences")
            self._drains.add(task)
            task.add_done_callback(self._drains.discard)
            return

        def forgotten() -> None:
            asyncio.get_running_loop().run_in_executor(None, self._copies.give_back, old.copy)

        self._engine.drop(old.model.prepared, forgotten)

    async def _drain(self, old: _Live, stateful: Stateful) -> None:
        """Let the sequences of a version end before its file goes."""
        self._registry.drain(old.model, on=True)
        try:
            await stateful.retire()
        finally:
            self._registry.drain(old.model, on=False)
        await asyncio.to_thread(self._copies.give_back, old.copy)
