"""The child process: loads one competitor, checks it, times it, and answers over a pipe.

Everything that can crash, hang or lie runs here. Requests and replies are JSON lines; a reply repeats
the request's nonce. The parent set the environment (threads, interpreter switches) before we started,
so nothing heavy is imported before the first request. Verdicts on times are made by the parent: this
side returns raw samples.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import random
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TextIO
from weakref import WeakValueDictionary

from rooftune import audit, check, clock, registry, screen, spaces
from rooftune.core import CompileError, Op, Problem, RooftuneError, Status
from rooftune.fence import Fenced, bits
from rooftune.nursery import die_with_parent

VERIFY_ROWS = 6  # rows of a timed output that are compared with float64
LATER = 3  # calls between the first on new contents and one that it is compared with
KEPT = 32  # builds that may be asked for again: Numba took 30 s for those of one thorough check of a GPU's product
ROTATION = 4096  # inputs change between rounds by a random rotation of up to this many elements


class Failure(Exception):
    """A competitor failed in a stage that has a status of its own."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Buffers:
    """The tensors that candidates on one problem are timed on, in turn: 15 entrants of a softmax of
    32768 x 32768 in bf16 with tensors of their own would hold 96 GB."""

    def __init__(self, op: Op, problem: Problem, device: str) -> None:
        self.op, self.problem, self.device = op, problem, device
        self.tensors: tuple[Any, ...] = ()
        self.pools: list[Any] = []
        self.contents: list[Any] = []  # what `fill` put into the tensors
        self.out: Fenced | None = None

    def fill(self, seed: int) -> Fenced:
        """Make the inputs, or change their contents, at copy speed; poison the output and return it."""
        import torch

        if self.out is None:
            self.tensors = self.op.inputs(self.problem, check.generator(self.device, seed), self.device, "normal")
            shape, dtype = self.op.output(self.problem)
            self.out = Fenced(shape, dtype, self.device)
            flat = [t.view(-1) for t in self.tensors]
            self.pools = [torch.cat((f, f[:ROTATION])) if f.numel() >= 64 else f.clone() for f in flat]
        rng, self.contents = random.Random(seed), []
        for tensor, pool in zip(self.tensors, self.pools, strict=True):
            start = rng.randrange(1, min(ROTATION, tensor.numel())) if tensor.numel() >= 64 else 0
            self.contents.append(pool[start : start + tensor.numel()])
            tensor.view(-1).copy_(self.contents[-1])
        self.out.poison()
        return self.out

    def changed(self) -> str:
        """Which input no longer holds what it was filled with: what is right for it would be no answer."""
        import torch

        for index, (tensor, given) in enumerate(zip(self.tensors, self.contents, strict=True)):
            flat, whole = tensor.view(-1), getattr(torch, f"int{8 * tensor.itemsize}")
            if not torch.equal(flat.view(whole), given.view(whole)):
                return f"changed its input {index} in a timed call"
        return ""

    def sync(self) -> None:
        """Wait for the device."""
        check.sync(self.device)


@dataclass
class Handle:
    """A prepared candidate: what is timed, on which tensors."""

    run: check.Run
    on: Buffers
    verified: bool = False  # a timed output was judged before

    def rows(self, seed: int) -> list[int]:
        """Which rows of a timed output are to be judged.

        Of an output in parts the first time has the edges of all, later ones rows at random: a row that is a sum
        over all inputs (dweight at 32768 x 4096) takes seconds in float64, which no round should cost.
        """
        assert self.on.out is not None
        shape, parts = self.on.out.tensor.shape, self.on.op.parts(self.on.problem)
        total = math.prod(shape[:-1])
        if parts and self.verified:
            return sorted(random.Random(seed).sample(range(total), min(total, VERIFY_ROWS)))
        self.verified = True
        return screen.sample_rows(total, seed, VERIFY_ROWS, parts)

    def look(self, rows: list[int]) -> Any:
        """These rows of the output as they are now: what is written later is too late."""
        assert self.on.out is not None
        out = self.on.out.tensor.detach()
        return out.reshape(-1, out.shape[-1])[rows]

    def verify(self, rows: list[int], *looks: Any) -> str:
        """Judge what was seen of outputs on the present inputs; returns what is wrong, or nothing."""
        op, problem, out = self.on.op, self.on.problem, self.on.out
        assert out is not None
        if damage := out.damage():
            return f"{damage} in a timed call"
        if changed := self.on.changed():
            return changed
        where, seen = check.place(self.on.tensors, self.on.device), list[Any]()
        for look in looks:
            if any(look.shape == s.shape and bool((bits(look) == bits(s)).all()) for s in seen):
                continue  # the same bits, as of most kernels
            seen.append(look)
            wrong, _ = check.compare_rows(op, problem, look, self.on.tensors, rows, "timed", where)
            if wrong:
                return f"output of a timed call: {wrong}"
        return ""

    def pair(self, seed: int) -> tuple[audit.Cost, audit.Cost]:
        """What a call on new contents costs, and a later one on the same; an answer is in the output then.

        Calls on other contents come before, so that the allocator is as warm for the first as for the later one: 16 MB
        of torch's RMS norm had gone back to the system, and new pages cost 8 times the CPU seconds of a later call.
        """
        self._first_and_later(seed + 1)
        return self._first_and_later(seed)

    def _first_and_later(self, seed: int) -> tuple[audit.Cost, audit.Cost]:
        arguments = (self.on.fill(seed).tensor, *self.on.tensors)
        first = audit.cost(lambda: self.run(*arguments), self.on.sync)[0]  # its result is not kept: nor are later ones
        for _ in range(LATER):
            self.run(*arguments)
        later, result = audit.cost(lambda: self.run(*arguments), self.on.sync)
        check.settle(result, arguments[0])
        return first, later


class Session:
    """The worker's state and its verbs. Each public method is a verb; its keyword arguments come from the request."""

    def __init__(self, mode: str, device: str) -> None:
        self.mode = mode  # native, emulate or compile
        self.device = device
        self.handles: dict[int, Handle] = {}
        self.buffers: WeakValueDictionary[str, Buffers] = WeakValueDictionary()  # as long as a handle has them
        self.built: OrderedDict[str, check.Run] = OrderedDict()
        self.serial = 0
        self.originals = audit.Originals()

    def _module(self, impl: str) -> Any:
        found = registry.impl(impl)
        if self.mode == "native":
            self.originals.remember(registry.op(found.op))
        try:
            module = found.load()
        except RooftuneError:
            raise
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{found.path.name} raises on import: {type(error).__name__}: {error} ({where.name}:{where.lineno})"
            raise Failure(Status.FAILED_COMPILE, text) from error
        if "torch" in sys.modules:
            import torch

            torch.set_num_threads(int(os.environ.get("ROOFTUNE_THREADS", "1")))
        return module

    def hello(self) -> dict[str, Any]:
        """Who answers."""
        return {"pid": os.getpid(), "python": sys.version.split()[0], "mode": self.mode}

    def space(self, impl: str, problem: str, limit: int = 100_000, seed: int = 0) -> dict[str, Any]:
        """The valid configs for a problem (a seeded sample of them above `limit`), and the default."""
        module = self._module(impl)
        try:
            space = spaces.checked(module.SPACE)
        except RooftuneError as error:
            raise Failure(Status.FAILED_COMPILE, str(error)) from error
        try:
            return spaces.described(space, registry.problem(problem), limit, seed)
        except RooftuneError as error:
            raise _refusal(error) from error

    def prepare(self, impl: str, problem: str, config: dict[str, Any], seed: int, thorough: bool) -> dict[str, Any]:
        """Build a candidate, unless it is among the last ones that were built, and check it. Returns a handle if it is
        right, else the status and the reason."""
        found, module = registry.impl(impl), self._module(impl)
        parsed = registry.problem(problem)
        op = registry.op(parsed.op)
        maker: Callable[..., check.Run] = module.emulate if self.mode == "emulate" else module.build
        start = time.perf_counter()
        key = json.dumps([impl, problem, config], sort_keys=True)
        try:
            run = self.built.pop(key, None) or maker(parsed, config)
        except RooftuneError as error:
            raise _refusal(error) from error
        except Exception as error:
            raise Failure(Status.FAILED_COMPILE, _line(error)) from error
        self._keep(key, run)
        built_s = time.perf_counter() - start
        try:
            verdict = check.check(
                op, parsed, config, maker, seed, self.device, run, module.SPACE.valid, thorough, found.per_shape
            )
        except RooftuneError as error:
            raise _refusal(error) from error
        except Exception as error:
            raise Failure(Status.FAILED_LAUNCH, _line(error)) from error
        if verdict.ok and (replaced := self.originals.replaced()):
            verdict = replace(verdict, ok=False, reason=replaced)
        reply: dict[str, Any] = {"status": str(Status.OK if verdict.ok else Status.WRONG), "reason": verdict.reason}
        reply |= {"error": verdict.as_json(), "build_s": built_s, "check_s": time.perf_counter() - start - built_s}
        if verdict.ok and self.mode == "native":
            self.serial += 1
            on = self.buffers.setdefault(str(parsed), Buffers(op, parsed, self.device))
            self.handles[self.serial] = Handle(run, on)
            reply["handle"] = self.serial
        return reply

    def _keep(self, key: str, run: check.Run) -> None:
        """Remember a build. Builds may hold workspaces: on a CPU fewer are kept, on a GPU none once half is used."""
        if self.device != "cpu":
            import torch

            free, total = torch.cuda.mem_get_info(self.device)
            if free < total / 2:
                self.built.clear()
                return
        self.built[key] = run
        if len(self.built) > (KEPT if self.device != "cpu" else KEPT // 4):
            self.built.popitem(last=False)

    def time(self, handle: int, seed: int, verify: bool = True, **options: Any) -> dict[str, Any]:
        """Samples of one round, in seconds per call, on inputs whose contents changed since the last round."""
        found = self.handles[handle]
        out = found.on.fill(seed)
        arguments = (out.tensor, *found.on.tensors)
        rows = found.rows(seed) if verify else []
        # The first call on these contents, which also warms caches and loads code: who remembers answers has none yet.
        first, result = audit.cost(lambda: found.run(*arguments), found.on.sync)
        check.settle(result, out.tensor)
        early = found.look(rows) if verify else None
        out.poison()  # so that a later call that leaves what the first one wrote leaves nothing
        last = [result]

        def keeping(*tensors: Any) -> None:
            last[0] = found.run(*tensors)

        returns = result is not None  # then the last timed call's own result is what gets verified
        timing = clock.time_calls(keeping if returns else found.run, [arguments], self.device, **options)
        if returns:
            check.settle(last[0], out.tensor)
        wrong = next((note for note in timing.notes if "another stream" in note), "")
        if verify and not wrong:
            wrong = found.verify(rows, found.look(rows), early) or self.originals.replaced()
        if verify and not wrong:
            seeds, next_s = random.Random(seed), timing.wall_s or min(timing.samples_s)
            asked: list[Any] = []

            def pair() -> tuple[audit.Cost, audit.Cost]:
                costs = found.pair(seeds.getrandbits(31))
                asked[:] = [found.look(rows)]
                return costs

            wrong = audit.remembers(first.wall_s, next_s, pair, self.device) or found.verify(rows, *asked)
        if wrong:
            return {"status": str(Status.WRONG), "reason": wrong}
        return {"status": str(Status.OK), "reason": "", **asdict(timing)}

    def energy(self, handle: int, seed: int, **how: Any) -> dict[str, Any]:
        """Joules per call from tick-aligned windows, or why there are none. Takes about a minute with a sensor,
        less with fewer `windows`; `how` as `metering.measure`."""
        from rooftune import device, metering, sensors
        from rooftune.energy import Energy

        kind, _, index = self.device.partition(":")
        sensor = sensors.find_sensor(device.find(f"{kind}:{index or 0}" if kind != "cpu" else "cpu"))
        if isinstance(sensor, Energy):
            return {"energy": sensor.as_json()}
        found = self.handles[handle]
        out = found.on.fill(seed)
        load = metering.load(found.run, [(out.tensor, *found.on.tensors)], self.device)
        return {"energy": metering.measure(sensor, load, **how).as_json()}

    def release(self, handle: int) -> dict[str, Any]:
        """Free a candidate, and with the last on a problem its tensors, on a GPU for other processes too."""
        gone = self.handles.pop(handle, None)
        if gone is not None and self.device != "cpu" and all(h.on is not gone.on for h in self.handles.values()):
            del gone
            import torch

            torch.cuda.empty_cache()
        return {}

    def compile(self, impl: str, problem: str, config: dict[str, Any], arch: str) -> dict[str, Any]:
        """Machine code for an architecture, without a device: what it takes and which instructions it uses."""
        module = self._module(impl)
        try:
            return {"status": str(Status.OK), **asdict(module.compile_for(registry.problem(problem), config, arch))}
        except RooftuneError as error:
            raise _refusal(error) from error
        except Exception as error:
            raise Failure(Status.FAILED_COMPILE, _line(error)) from error

    def call(self, function: str, **arguments: Any) -> Any:
        """Any function of rooftune, as `rooftune.probe:ceilings`; its result must be plain data."""
        module, _, name = function.partition(":")
        if not module.startswith("rooftune."):
            raise ValueError(f"{function} is not a function of rooftune")
        return getattr(importlib.import_module(module), name)(**arguments)


def _refusal(error: RooftuneError) -> Failure:
    """A competitor that does not do a problem is skipped; one that does not compile has failed."""
    return Failure(Status.FAILED_COMPILE if isinstance(error, CompileError) else Status.SKIPPED, str(error))


def _line(error: BaseException) -> str:
    """One line of an error: its type, its text, and where in the competitor it was raised."""
    text = " ".join(str(error).split())[:300]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({os.path.basename(where.filename)}:{where.lineno})"


def serve(session: Session, requests: TextIO, replies: TextIO) -> None:
    """Answer until the pipe closes."""
    for line in requests:
        request = json.loads(line)
        verb = getattr(session, request["verb"])
        try:
            reply = {"value": verb(**request["args"])}
        except Failure as failure:
            reply = {"value": {"status": str(failure.status), "reason": str(failure)}}
        except RooftuneError as error:
            reply = {"error": str(error), "known": True}
        except Exception as error:  # noqa: BLE001 - anything else is reported with its trace, and the worker lives on
            reply = {"error": _line(error), "known": False, "trace": traceback.format_exc()[-4000:]}
        replies.write(json.dumps({"nonce": request["nonce"], **reply}, allow_nan=True) + "\n")
        replies.flush()


def main(arguments: list[str]) -> None:
    """`python -m rooftune.worker REQUEST_FD REPLY_FD MODE DEVICE PARENT`."""
    die_with_parent(int(arguments[4]))
    os.environ["ROOFTUNE_WORKER"] = "1"  # kernels/common/numba_kept.py: nobody changed our modules here
    read_fd, write_fd, mode, device = int(arguments[0]), int(arguments[1]), arguments[2], arguments[3]
    with os.fdopen(read_fd) as requests, os.fdopen(write_fd, "w") as replies:
        serve(Session(mode, device), requests, replies)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # a GPU's libraries take up to seconds to take themselves down; the parent ends what we started


if __name__ == "__main__":
    main(sys.argv[1:])
