"""A server under load: many clients, mixed lengths, a third of them hanging up; against the engine alone.

    ./run benchmark serve_load --model DIR --seconds 180

Starts `bdh serve` on a loopback port and lets clients ask it from another process: half of them stream, half wait for
the whole; prompts and answers of mixed lengths; a third goes away in the middle. Before and after it the same requests
go to an engine alone, in a process of its own. Writes benchmarks/results/serve_load.json.
"""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import save

WORDS = "the small dragon hatches and a large one watches over every egg of the nest in the cold morning"


@dataclass
class Asked:
    """One request: its prompt, how long its answer is, and when its client hangs up."""

    prompt: str
    max_tokens: int
    stream: bool
    hangs_up_after: float | None  # tokens, of a stream; else seconds


def requests(seed: int) -> Iterator[Asked]:
    """The mix, the same for the same seed."""
    dice = random.Random(seed)
    while True:
        prompt = " ".join(dice.choices(WORDS.split(), k=dice.choice([3, 10, 30, 100])))
        max_tokens = dice.choice([8, 32, 64, 128])
        stream = dice.random() < 0.5
        hangs_up = dice.random() < 1 / 3
        after = (dice.randrange(1, max_tokens) if stream else dice.random()) if hangs_up else None
        yield Asked(prompt, max_tokens, stream, after)


@dataclass
class Tally:
    """What clients saw."""

    done: int = 0
    hung_up: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    tokens: int = 0


# ------------------------------------------------------------------------------------------------ the server's clients


async def ask(host: str, port: int, asked: Asked, tally: Tally) -> None:
    """One request on a connection of its own."""
    body = json.dumps(
        {
            "model": "load",
            "prompt": asked.prompt,
            "max_tokens": asked.max_tokens,
            "ignore_eos": True,
            "stream": asked.stream,
            **({"stream_options": {"include_usage": True}} if asked.stream else {}),
        }
    ).encode()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        if asked.hangs_up_after is not None and not asked.stream:
            await asyncio.sleep(asked.hangs_up_after)
            tally.hung_up += 1
            return
        status = (await reader.readline()).split()
        if len(status) < 2 and asked.hangs_up_after is None:
            tally.lost.append("no status line")
            return
        code = int(status[1])
        if code == 429:
            tally.refused += 1
            return
        if code != 200:
            tally.failed.append(f"{code}: {(await reader.read())[-300:].decode(errors='replace')}")
            return
        if asked.stream:
            await take_stream(reader, asked, began, tally)
        else:
            whole = await reader.read()
            usage = json.loads(whole[whole.index(b"\r\n\r\n") + 4 :])["usage"]
            if usage["completion_tokens"] != asked.max_tokens:
                tally.lost.append(f"{usage} of {asked.max_tokens}")
            tally.tokens += usage["completion_tokens"]
            tally.done += 1
    except (ConnectionError, ValueError, KeyError, IndexError) as error:
        tally.lost.append(f"{type(error).__name__}: {error}")
    finally:
        writer.transport.abort()


async def take_stream(reader: asyncio.StreamReader, asked: Asked, began: float, tally: Tally) -> None:
    """Reads events to the end, or to where the client hangs up."""
    events = 0
    tail = b""
    while piece := await reader.read(1 << 16):
        if events == 0 and b"data: " in piece:
            tally.first_token.append(time.perf_counter() - began)
        events += piece.count(b"data: ")
        if asked.hangs_up_after is not None and events >= asked.hangs_up_after:
            tally.hung_up += 1
            return
        tail = (tail + piece)[-2000:]
    written = re.search(rb'"completion_tokens":(\d+)', tail)
    if b"data: [DONE]" not in tail or written is None or int(written[1]) != asked.max_tokens:
        tally.lost.append(f"a stream ended with {tail[-200:]!r}")
        return
    tally.tokens += int(written[1])
    tally.done += 1


async def client(number: int, host: str, port: int, until: float, tally: Tally) -> None:
    for asked in requests(number):
        if time.monotonic() >= until:
            return
        await asyncio.wait_for(ask(host, port, asked, tally), 300)


async def clients(count: int, host: str, port: int, seconds: float) -> Tally:
    tally = Tally()
    until = time.monotonic() + seconds
    await asyncio.gather(*(client(number, host, port, until, tally) for number in range(count)))
    return tally


# --------------------------------------------------------------------------------------------------- the engine alone


def engine_alone(args: argparse.Namespace) -> float:
    """Tokens a second of the engine with the same requests, as many in work as there are clients."""
    from bdh.inference.engine_process import EngineSettings, load
    from bdh.inference.request import Request
    from bdh.inference.sampling_params import SamplingParams

    llm = load(EngineSettings(args.model, max_batch_size=args.slots))
    mixes = [requests(number) for number in range(args.clients)]
    owners: dict[str, int] = {}
    leaves: dict[str, int] = {}

    def add(number: int) -> None:
        asked = next(mixes[number])
        params = SamplingParams(max_new_tokens=asked.max_tokens, temperature=1.0, ignore_eos=True)
        request = Request(llm.encode(asked.prompt), params)
        owners[llm.engine.add(request)] = number
        if asked.hangs_up_after is not None and asked.stream:
            leaves[request.id] = int(asked.hangs_up_after)

    for number in range(args.clients):
        add(number)
    begun, tokens, start = False, 0, time.perf_counter()
    while (now := time.perf_counter()) < start + args.alone_seconds:
        if not begun and now > start + args.alone_seconds / 5:  # warm
            begun, tokens, start_counting = True, llm.engine.stats.decode_tokens, now
        for event in llm.engine.step():
            gone = event.request_id in leaves
            if gone:
                leaves[event.request_id] -= 1
            if event.finish_reason or (gone and leaves[event.request_id] == 0):
                llm.engine.cancel(event.request_id)
                leaves.pop(event.request_id, None)
                add(owners.pop(event.request_id))
    return (llm.engine.stats.decode_tokens - tokens) / (time.perf_counter() - start_counting)


def alone_in_a_process(args: argparse.Namespace) -> float:
    command = [sys.executable, "-m", "benchmarks.serve_load", "--alone", "--model", args.model]
    for name in ("clients", "slots", "alone_seconds"):
        command += [f"--{name}", str(getattr(args, name))]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


# -------------------------------------------------------------------------------------------------------- the whole


def metrics(url: str) -> dict[str, float]:
    with urllib.request.urlopen(f"{url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    found: dict[str, float] = {}
    for line in lines:
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name.split("{")[0]] = found.get(name.split("{")[0], 0.0) + float(value)
    return found


def under_load(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the server and its clients; what both saw."""
    log = Path(args.log)
    with log.open("wb") as file:
        command = [sys.executable, "-m", "bdh", "serve", "--model", f"load={args.model}", "--port", "0"]
        command += ["--max_batch_size", str(args.slots), "--serve.logging.access", "false", *args.serve]
        process = subprocess.Popen(command, stderr=file)
    try:
        url = wait_for(log, process)
        host, port = url.removeprefix("http://").split(":")
        before, start = metrics(url), time.monotonic()
        tally = asyncio.run(clients(args.clients, host, int(port), args.seconds))
        after, took = metrics(url), time.monotonic() - start
        time.sleep(1)
        end = metrics(url)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    written = after["bdh_engine_written_tokens_total"] - before["bdh_engine_written_tokens_total"]
    first = sorted(tally.first_token)
    return {
        "seconds": round(took, 1),
        "requests_done": tally.done,
        "hung_up": tally.hung_up,
        "refused_429": tally.refused,
        "failed": tally.failed[:10],
        "n_failed": len(tally.failed),
        "lost": tally.lost[:10],
        "n_lost": len(tally.lost),
        "leaked_slots": end["bdh_engine_running"] + end["bdh_engine_waiting"],
        "engine_tokens_per_second": round(written / took, 1),
        "tokens_of_whole_answers_per_second": round(tally.tokens / took, 1),
        "time_to_first_token_seconds": {
            "p50": round(statistics.median(first), 3),
            "p99": round(first[int(len(first) * 0.99)], 3),
            "n": len(first),
        },
        "exit_code": code,
    }


def wait_for(log: Path, process: "subprocess.Popen[bytes]") -> str:
    while process.poll() is None:
        found = re.search(r"serving .* at (http://[^\s\"]+)", log.read_text())
        if found:
            try:
                urllib.request.urlopen(f"{found[1]}/health/ready").close()
                return found[1]
            except OSError:
                pass
        time.sleep(0.1)
    raise SystemExit(log.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--alone_seconds", type=float, default=30)
    parser.add_argument("--alone", action="store_true", help="only the engine, for this script's own use")
    parser.add_argument("--log", default="serve_load.log")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more flags of bdh serve, last")
    args = parser.parse_args()
    if args.alone:
        print(engine_alone(args))
        return
    before = alone_in_a_process(args)
    loaded = under_load(args)
    after = alone_in_a_process(args)
    alone = (before + after) / 2
    result = {
        "clients": args.clients,
        "slots": args.slots,
        "engine_alone_tokens_per_second": [round(before, 1), round(after, 1)],
        "server": loaded,
        "share_of_engine_alone": round(loaded["engine_tokens_per_second"] / alone, 3),
    }
    print(json.dumps(result, indent=1))
    print(save("serve_load", result))


if __name__ == "__main__":
    main()
