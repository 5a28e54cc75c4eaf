"""LMDeploy behind our command on one GPU: is it right, how fast is it, and what does our gateway cost? InternVL2-2B shapes, random weights.

python bench/serve_gpu.py --engine-python PY --work FOLDER --out FOLDER [--photos FOLDER] [--tokenizer tokenizer.model] [--seconds 470]

`PY` is the Python of an environment with LMDeploy. The stages, each with a limit of its own, each writing OUT/serve_gpu.json when it is done:
  make     `intervale init`, weights made decisive (see `sharpen`), `intervale export` to official and to hf
  ours     `intervale serve --engine lmdeploy` on the official export: answers to the cases, then 32 clients and single ones, through
           the gateway and directly at the LMDeploy behind it, in turn; how often a tile was encoded, by TurboMind's log
  plain    the same load, one round, with INTERVALE_ENGINE_PATCHES=off: what our changes to LMDeploy bring
  parity   LMDeploy's logits and its served tokens against the network in transformers, with a wrong picture as the control
  shipped  the same load on `lmdeploy serve api_server` with its own defaults
  hf       LMDeploy on the hf export
"""

import argparse
import asyncio
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from serve_gpu_engine import engine_of, tiles_encoded
from stream_client import Server, ask, data_url, parts, pictures

HERE = Path(__file__).parent
STAGES = ("make", "ours", "plain", "parity", "shipped", "hf")
_WORDS = "请描述这张照片里的菜品，并说出它的主要食材。"
_LONG = "What is on the plate, and where is it from? " * 6
_STARTED: list[subprocess.Popen] = []


def sharpen(folder: Path) -> None:
    """Random weights whose likeliest token is clear and depends on the picture, as a trained model's does: loud branches, 512 loud
    words, control tokens never. As drawn, the gaps between tokens are those of bfloat16's rounding. Queries and keys stay as drawn:
    1.8 times as large, 24 layers turn that rounding into a cosine of 0.996."""
    import torch
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer

    config = json.loads((folder / "config.json").read_text())
    llm, vision = config["llm_config"], config["vision_config"]
    depth, tower = (2 * llm["num_hidden_layers"]) ** 0.5, (2 * vision["num_hidden_layers"]) ** 0.5
    heads, kv = llm["num_attention_heads"], llm["num_key_value_heads"]
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("attention.wqkv.weight"):
            weight.view(kv, heads // kv + 2, -1, weight.shape[-1])[:, -1] *= 1.3
        elif name.endswith(("attention.wo.weight", "feed_forward.w2.weight")):
            weight *= depth
        elif name.endswith(("attn.proj.weight", "mlp.fc2.weight")):
            weight *= tower
        elif name.endswith(("tok_embeddings.weight", "position_embedding", "class_embedding")):
            weight *= 50 if "tok" in name else 20
        elif name.endswith((".ls1", ".ls2")):
            weight *= 0.5
    output = weights["language_model.output.weight"]
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))
    control = sorted(tokens.get_added_tokens_decoder())
    words = [number for number in range(min(len(output), 60_000)) if number not in control]
    words = [number for number in words if (said := tokens.id_to_token(number)) and said.lstrip("▁").isalpha()] or words
    loud = torch.tensor(words)[torch.randperm(len(words), generator=torch.Generator().manual_seed(7))[:512]]
    output[loud] *= 5
    output[control] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cases(photos: Path | None) -> dict[str, dict[str, Any]]:
    """Name -> messages, tokens to make, and for the control the messages with another picture."""
    large, small = pictures(2, (1280, 960), photos), pictures(4, (448, 448), photos)
    url = {f"large{number}": data_url(picture, "png") for number, picture in enumerate(large)}
    url |= {f"small{number}": data_url(picture, "png") for number, picture in enumerate(small)}

    def case(words: str, right: tuple[str, ...], wrong: tuple[str, ...] = ()) -> dict[str, Any]:
        def said(names: tuple[str, ...]) -> list[dict[str, Any]]:
            return [{"role": "user", "content": parts(words, *(url[name] for name in names))}]

        return {"messages": said(right), "wrong": said(wrong) if wrong else None, "new": 32}

    return {
        "13 tiles": case(_WORDS, ("large0",), ("large1",)),
        "13 tiles, another photo": case(_WORDS, ("large1",), ("large0",)),
        "1 tile": case(_WORDS, ("small0",), ("small1",)),
        "1 tile, another photo": case(_WORDS, ("small2",), ("small0",)),
        "2 pictures": case("Which of the two dishes is spicier, and why?", ("small0", "small3"), ("small3", "small0")),
        "text": case("白切鸡是怎么做的？", ()),
    }


@functools.cache
def urls_of(count: int, size: tuple[int, int], photos: Path | None) -> list[str]:
    """Data URLs of that many JPEGs."""
    return [data_url(picture) for picture in pictures(count, size, photos)]


class Bench:
    """The run: its folders, its clock, and what it has found so far."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked, self.began = asked, time.monotonic()
        self.work, self.out, self.photos = asked.work, asked.out, asked.photos
        self.path = self.out / "serve_gpu.json"
        self.found: dict[str, Any] = {"bench": "serve_gpu", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "seconds": {}}

    def left(self) -> float:
        """Seconds until all must be over."""
        return self.asked.seconds - (time.monotonic() - self.began)

    def note(self, **found: Any) -> None:
        """Keep it, on the disk at once."""
        self.found |= found
        self.path.write_text(json.dumps(self.found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"[{time.monotonic() - self.began:.0f} s] " + json.dumps(found, ensure_ascii=False)[:1500], flush=True)

    def run(self, *words: Any, limit: float = 120, python: str = sys.executable) -> None:
        """A command to its end."""
        subprocess.run([python, *map(str, words)], check=True, timeout=max(5.0, min(limit, self.left())))

    def serve(self, folder: Path, limit: float = 150, name: str = "", **more: str) -> tuple[dict[str, Server], subprocess.Popen]:
        """`intervale serve --engine lmdeploy`: the gateway, and the LMDeploy behind it. `name` is the logs', `more` its environment."""
        words = ["serve", folder, "--engine", "lmdeploy", "--engine-python", self.asked.engine_python, "--no-page", "--port", "0"]
        log = (self.out / f"gateway-{name or folder.name}.log").open("w")
        command = [sys.executable, "-m", "intervale", *map(str, words)]
        environment = os.environ | {"INTERVALE_LANG": "en", "TM_LOG_LEVEL": "INFO"} | more
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        _STARTED.append(process)
        began = time.monotonic()
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        said = ""
        while not (found := re.search(r"http://[\d.:]+", said)):
            said += (process.stdout.read() or b"").decode()
            if process.poll() is not None or time.monotonic() - began > min(limit, self.left()):
                raise RuntimeError(f"{folder.name} was not served: {Path(log.name).read_text()[-2500:]}")
            time.sleep(0.1)
        self.found["seconds"][f"serve {name or folder.name}"] = round(time.monotonic() - began, 1)
        print(Path(log.name).read_text()[-600:], flush=True)
        port, key = engine_of(process.pid)
        gateway, engine = Server(f"{found[0]}/v1", folder.name), Server(f"http://127.0.0.1:{port}/v1", folder.name, key)
        return {"gateway": gateway, "engine": engine}, process

    def loads(self, servers: dict[str, Server], prefix: str, rounds: int) -> None:
        """32 clients with 13-tile and 1-tile pictures: so many requests to each server, in each round."""
        from serve import compare

        kinds = {"13 tiles": ((1280, 960), self.asked.requests // 2), "1 tile": ((448, 448), self.asked.requests)}
        for name, (size, count) in kinds.items():
            urls = urls_of(min(count, 96), size, self.photos)
            contents = [parts(f"{number}. {_LONG}", urls[number % len(urls)]) for number in range(count)]
            table = compare(servers, contents, min(32, count), self.asked.new, rounds)
            self.note(**{f"{prefix}32 clients, {name}": table | {"letters_a_picture": len(urls[0])}})

    def singles(self, servers: dict[str, Server], times: int = 40) -> None:
        """The first token's time for one client at a time, every question to both servers, either one first in turn.

        `overhead_ms`: the median of the pairs' differences; `of_the_median_ms`: half the width of its 95% interval (order statistics).
        """
        kinds: dict[str, tuple[int, int] | None] = {"13 tiles": (1280, 960), "1 tile": (448, 448), "text": None}
        told = {}
        for name, size in kinds.items():
            urls = urls_of(times + 2, size, self.photos) if size else [""] * (times + 2)
            firsts: dict[str, list[float]] = {server: [] for server in servers}

            async def each(urls: list[str] = urls, firsts: dict[str, list[float]] = firsts, size: Any = size) -> None:
                for number, url in enumerate(urls):
                    turn = list(servers.items())
                    for server, where in turn if number % 2 else reversed(turn):
                        content = parts(f"{server} {number}. {_LONG}", *([url] if size else []))
                        answer = await ask(where, where.request(content, 16))
                        if number >= 2:
                            firsts[server].append(answer.first)
                for where in servers.values():
                    where.connections.clear()

            asyncio.run(each())
            median = {server: round(1000 * statistics.median(values), 2) for server, values in firsts.items()}
            pairs = sorted(1000 * (a - b) for a, b in zip(firsts["gateway"], firsts["engine"], strict=True))
            reach = round(0.98 * len(pairs) ** 0.5)  # binomial: 95% of medians lie so many ranks around
            half = (pairs[min(len(pairs) - 1, len(pairs) // 2 + reach)] - pairs[max(0, len(pairs) // 2 - reach)]) / 2
            told[name] = median | {"overhead_ms": round(statistics.median(pairs), 2), "of_the_median_ms": round(half, 2)}
        self.note(**{"1 client, first token, ms": told})

    def cases(self) -> dict[str, dict[str, Any]]:
        """The questions of the comparison, also in the work folder."""
        asked = cases(self.photos)
        (self.work / "cases.json").write_text(json.dumps(asked), encoding="utf-8")
        return asked

    def prompt(self) -> Path:
        """The prompt's file, as our launcher writes it."""
        from intervale.engine.launch import lmdeploy_prompt
        from intervale.model.load import text_side

        side, path = text_side(self.work / "official"), self.work / "prompt.json"
        path.write_text(json.dumps(lmdeploy_prompt(side.template, side), ensure_ascii=False), encoding="utf-8")
        return path

    def log_of(self, name: str) -> Path:
        """The engine's own log."""
        found = re.search(r"its log: (\S+)", (self.out / f"gateway-{name}.log").read_text())
        assert found, "the gateway does not say where the engine's log is"
        return Path(found[1])

    def keep_log(self, name: str) -> None:
        """The engine's log goes with the engine; its ends stay."""
        said = self.log_of(name).read_text("utf-8", "replace")
        (self.out / f"engine-{name}.log").write_text(said[:5_000] + "\n...\n" + said[-60_000:], encoding="utf-8")

    def tiles(self, servers: dict[str, Server], name: str, prefix: str = "") -> None:
        """How often the engine encoded a tile of a load with large pictures."""
        told = tiles_encoded(self.log_of(name), servers["engine"], urls_of(16, (1280, 960), self.photos), self.asked.new)
        self.note(**{f"{prefix}tiles encoded": told})

    # The stages.

    def make(self) -> None:
        """The checkpoint and its exports."""
        base, began = self.work / "base", time.monotonic()
        tokenizer = ["--tokenizer", self.asked.tokenizer] if self.asked.tokenizer else []
        self.run("-m", "intervale", "init", base, "--preset", self.asked.preset, *tokenizer)
        made = time.monotonic()
        sharpen(base)
        sharpened = time.monotonic()
        threads = str(max(1, (os.cpu_count() or 2) // 2))
        both = []
        for form in ("official", "hf") if "hf" in self.asked.stages else ("official",):
            command = [sys.executable, "-m", "intervale", "export", str(base), str(self.work / form), "--format", form]
            both.append(subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}))
        failed = [one.args for one in both if one.wait(max(5.0, min(150.0, self.left())))]
        assert not failed, failed
        took = {"init": made - began, "sharpen": sharpened - made, "exports": time.monotonic() - sharpened}
        self.found["seconds"] |= {name: round(seconds, 1) for name, seconds in took.items()}
        self.note(model=f"{self.asked.preset}, exported by intervale export", new_tokens=self.asked.new)

    def ours(self) -> None:
        """Answers, then speed, through the gateway and directly at the engine behind it."""
        servers, process = self.serve(self.work / "official")
        asked = self.cases()
        answers = {name: answered(servers, case["messages"], case["new"]) for name, case in asked.items()}
        (self.work / "answers.json").write_text(json.dumps(answers), encoding="utf-8")
        same = sum(answer["gateway"] == answer["engine"] for answer in answers.values())
        self.note(answers=f"{same} of {len(answers)} answers are the same through the gateway and directly")
        self.loads(servers, "", self.asked.rounds)
        self.singles(servers)
        self.tiles(servers, "official")
        self.keep_log("official")
        stop(process)

    def plain(self) -> None:
        """The load on LMDeploy without our changes, else started as ours."""
        servers, process = self.serve(self.work / "official", name="plain", INTERVALE_ENGINE_PATCHES="off")
        self.loads(servers, "plain: ", 1)
        self.tiles(servers, "plain", "plain: ")
        self.keep_log("plain")
        stop(process)

    def parity(self) -> None:
        """LMDeploy's logits and served tokens against transformers' network."""
        folder, answers = self.work / "official", self.work / "answers.json"
        self.cases()
        if not answers.exists():
            answers.write_text("{}")
        files = [self.prompt(), self.work / "cases.json", self.work / "logits.pt"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        command = [self.asked.engine_python, str(HERE / "lmdeploy_logits.py"), str(folder), *map(str, files)]
        subprocess.run(command, check=True, timeout=max(5.0, min(110.0, self.left())), env=environment)
        self.run(HERE / "serve_gpu_parity.py", folder, self.work / "cases.json", files[2], answers, self.work / "parity.json")
        self.note(parity=json.loads((self.work / "parity.json").read_text()))

    def shipped(self) -> None:
        """The load on LMDeploy with its own defaults."""
        from intervale.engine.launch import free_port

        port, folder, prompt = free_port(), self.work / "official", self.prompt()
        words = ["serve", "api_server", folder, "--server-name", "127.0.0.1", "--server-port", port, "--chat-template", prompt]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
        }
        log = (self.out / "shipped.log").open("w")
        command = [self.asked.engine_python, str(HERE / "lmdeploy_shipped.py"), *map(str, words)]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        _STARTED.append(process)
        began = time.monotonic()
        while True:
            try:
                model = httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=2, trust_env=False).json()["data"][0]["id"]
                break
            except (httpx.HTTPError, KeyError):
                if process.poll() is not None or time.monotonic() - began > min(120, self.left()):
                    raise RuntimeError(f"LMDeploy as shipped did not start: {Path(log.name).read_text()[-2500:]}") from None
                time.sleep(0.5)
        self.found["seconds"]["serve as shipped"] = round(time.monotonic() - began, 1)
        self.loads({"shipped": Server(f"http://127.0.0.1:{port}/v1", model)}, "as shipped: ", 1)
        stop(process)
        for name in ("13 tiles", "1 tile"):
            ours, theirs = self.found.get(f"32 clients, {name}"), self.found.get(f"as shipped: 32 clients, {name}")
            if ours and theirs:
                ratio = {server: round(ours[server]["requests_s"] / theirs["shipped"]["requests_s"], 2) for server in ("gateway", "engine")}
                self.note(**{f"times as shipped, {name}": ratio})

    def hf(self) -> None:
        """LMDeploy on the hf export: does it load, and does it say the same?"""
        servers, process = self.serve(self.work / "hf")
        before = json.loads((self.work / "answers.json").read_text())
        told = {}
        for name, case in self.cases().items():
            answer = answered(servers, case["messages"], case["new"])
            same = next(
                (at for at, (a, b) in enumerate(zip(answer["ids"], before[name]["ids"], strict=False)) if a != b), len(answer["ids"])
            )
            told[name] = f"{same} of {len(answer['ids'])} tokens as from the official folder"
        self.note(hf=told)
        self.loads(servers, "hf: ", 1)
        self.keep_log("hf")
        stop(process)


def answered(servers: dict[str, Server], messages: list[dict[str, Any]], new: int) -> dict[str, Any]:
    """The text through the gateway; the text and the token ids directly at the engine."""
    body = {"messages": messages, "max_tokens": new, "temperature": 0}
    told: dict[str, Any] = {}
    for name, server in servers.items():
        more = {"return_token_ids": True, "ignore_eos": True} if name == "engine" else {}
        headers = {"Authorization": f"Bearer {server.key}"}
        got = httpx.post(
            f"{server.url}/chat/completions", json={"model": server.model, **body, **more}, headers=headers, timeout=60, trust_env=False
        )
        assert got.status_code == 200, got.text[:500]
        choice = got.json()["choices"][0]
        told[name] = choice["message"]["content"]
        if name == "engine":
            told["ids"] = choice["output_ids"]
    return told


def stop(process: subprocess.Popen) -> None:
    """End a server, and give the card time to be free."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)
    time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine-python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--preset", default="internvl2-2b")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=470)
    parser.add_argument("--stages", default=",".join(STAGES))
    asked = parser.parse_args()
    asked.stages = asked.stages.split(",")
    for folder in (asked.work, asked.out):
        folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(asked)
    for stage in asked.stages:
        began = time.monotonic()
        if bench.left() < 20:
            bench.note(**{f"{stage} left out": "no time was left"})
            continue
        try:
            getattr(bench, stage)()
        except Exception as error:
            bench.note(**{f"{stage} failed": f"{type(error).__name__}: {error}"[-3000:]})
        finally:
            for process in _STARTED:
                if process.poll() is None:
                    stop(process)
            bench.found["seconds"][stage] = round(time.monotonic() - began, 1)
    bench.note()
    print(json.dumps(bench.found, ensure_ascii=False))


if __name__ == "__main__":
    main()
