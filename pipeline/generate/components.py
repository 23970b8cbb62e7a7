"""The components of a whole pipeline: loaded when they are first called, and let go in turn.

A text encoder is many times larger than the denoiser, and is called once for a prompt; a decoder needs more memory for
one call than its weights take. So one component is in memory at a time, unless there is memory for all.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import RecipeError
from export.models.families import Config
from pipeline.backends.base import Arrays, Engine
from pipeline.generate.own_settings import OwnSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PipelineSource:
    """A whole pipeline as it is stored.

    name: of the bundle. class_name: of the diffusers pipeline. index: its model_index.json. engines: what loads the
    engine of a component, by its name, as "text_encoder". transformer, vae: configurations of diffusers. tokenizers:
    tokenizer.json files by the names of their components. scheduler: scheduler_config.json. prompts: texts that it
    draws. settings: what it is drawn with unless the caller says otherwise. height, width: of a picture in pixels, that
    the engines were made for; None: the model's own.
    """

    name: str
    class_name: str
    index: Mapping[str, object]
    engines: Mapping[str, Callable[[], Engine]]
    transformer: Config
    vae: Config
    tokenizers: Mapping[str, Path]
    scheduler: Path
    prompts: tuple[str, ...] = ()
    settings: OwnSettings = field(default_factory=OwnSettings)
    height: int | None = None
    width: int | None = None


class Components:
    """Runs the components of a pipeline. May be used from any number of threads.

    keep_loaded: keep every component in memory once it is there; else one at a time is.
    """

    def __init__(self, engines: Mapping[str, Callable[[], Engine]], keep_loaded: bool) -> None:
        self._load, self.keep_loaded = engines, keep_loaded
        self._loaded: dict[str, Engine] = {}
        self._lock = threading.Lock()
        self._turn = threading.Condition()
        self._drawing: int | None = None  # the thread whose turn it is
        self._depth = 0  # how often: a callback may draw with the pipeline that it is called by
        self._closed = False

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that are in memory."""
        return tuple(self._loaded)

    def run(self, name: str, inputs: Arrays) -> Arrays:
        """The outputs of a component, which is loaded where it is not yet. Raises RecipeError once all are closed."""
        if self.keep_loaded:
            with self._lock:
                engine = self._engine(name)
            return engine.run(inputs)
        with self._lock:
            return self._engine(name).run(inputs)

    def _engine(self, name: str) -> Engine:
        if self._closed:
            raise RecipeError("the pipeline is closed; load it again")
        if name not in self._loaded:
            if not self.keep_loaded:
                self._let_go()
            started = time.perf_counter()
            self._loaded[name] = self._load[name]()
            logger.info("%s loaded in %.1f s", name, time.perf_counter() - started)
        return self._loaded[name]

    def _let_go(self) -> None:
        while self._loaded:
            self._loaded.popitem()[1].close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Within, one request is drawn. Without `keep_loaded` those of other threads wait meanwhile, so that they do
        not take each other's components away, and nothing is loaded at the end."""
        if self.keep_loaded:
            yield
            return
        own = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._drawing in (None, own))
            self._drawing, self._depth = own, self._depth + 1
        try:
            yield
        finally:  # in whichever thread: of a generator that is given up it may be another one
            with self._turn:
                self._depth -= 1
                if self._depth == 0:
                    with self._lock:
                        self._let_go()
                    self._drawing = None
                    self._turn.notify_all()

    def close(self) -> None:
        """Let all go, when the calls that are running have ended."""
        with self._lock:
            self._closed = True
            self._let_go()


def timed(run: Callable[[Arrays], Arrays], name: str, seconds: dict[str, float]) -> Callable[[Arrays], Arrays]:
    """`run`, which adds what each call takes to `seconds` of `name`."""

    def measured(inputs: Arrays) -> Arrays:
        started = time.perf_counter()
        try:
            return run(inputs)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    return measured
