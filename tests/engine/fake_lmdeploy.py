"""The parts of LMDeploy 0.18 that our changes touch, small: one module under all the names it goes by there (see `lmdeploy` in test_patches.py)."""

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace


class ResponseType:
    SUCCESS, FINISH, CANCEL = "success", "finish", "cancel"


@dataclass
class EngineOutput:
    status: str
    token_ids: list


class StreamingSemaphore:
    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self.fut = None
        self.val = 0

    async def acquire(self):
        if self.val:
            self.val = 0
            return
        self.fut = self.loop.create_future()
        await self.fut
        self.fut = None
        self.val = 0

    def release(self):
        if not self.val:
            self.val = 1
            if self.fut and not self.fut.done():
                self.fut.set_result(None)


class State:
    """The newest state of a request, to be taken once; the semaphore is released for one that was not there."""

    def __init__(self, sem, instance, ids):
        self.sem, self.instance, self.ids, self.newest = sem, instance, ids, None

    def put(self, status, count):
        pending, self.newest = self.newest, (status, count)
        if pending is None:
            self.sem.release()

    def consume(self):
        taken, self.newest = self.newest, None
        return taken


class Model:
    """TurboMind: `started` is what it was given, and the test makes the tokens."""

    def __init__(self, room=8192, **more):
        self.engine_config = SimpleNamespace(max_prefill_token_num=room, **more)
        self.started = []


class TurboMindInstance:
    def __init__(self, tm_model):
        self.tm_model = tm_model
        self.cancelled = 0

    async def async_cancel(self, session_id=None):
        self.cancelled += 1

    async def async_stream_infer(self, session_id, input_ids, multimodal=None, stream_output=False, **kwargs):
        if kwargs.get("broken"):
            raise ValueError("the picture has a fault")
        sem = StreamingSemaphore()
        shared_state = State(sem, self, input_ids)
        self.tm_model.started.append(shared_state)
        before = 0
        while True:
            await sem.acquire()
            status, count = shared_state.consume()
            yield EngineOutput(status, list(range(before, count)))
            before = count
            if status != ResponseType.SUCCESS:
                return


@dataclass
class DetokenizeState:
    ids_offset: int = 0
    prev_tokens: list | None = None
    prefix_offset: int = 0
    read_offset: int = 0


class Vocabulary:
    """An id below 256 is a byte, -1 a control token, others letters with a blank before them."""

    def convert_ids_to_tokens(self, ids, skip_special_tokens=True):
        return [f"<0x{i:02X}>" if i < 256 else f"▁{chr(i)}" for i in ids if i != -1 or not skip_special_tokens]

    def text(self, tokens):
        said = b"".join(bytes([int(t[3:5], 16)]) if t.startswith("<0x") else t.replace("▁", " ").encode() for t in tokens)
        return said.decode("utf-8", "replace").removeprefix(" ")  # as sentencepiece does at the beginning of a text


class HuggingFaceTokenizer:
    walked = 0

    def __init__(self):
        self.model = Vocabulary()

    def detokenize_incrementally(self, all_input_ids, state, skip_special_tokens=True, spaces_between_special_tokens=True):
        prev, prefix, read = state.prev_tokens, state.prefix_offset, state.read_offset
        new = self.model.convert_ids_to_tokens(all_input_ids[state.ids_offset :], skip_special_tokens)
        if prev is None:
            HuggingFaceTokenizer.walked += state.ids_offset
            prev = self.model.convert_ids_to_tokens(all_input_ids[: state.ids_offset], skip_special_tokens)
            read = len(prev)
        prev += new  # in place, as LMDeploy does
        before, text = self.model.text(prev[prefix:read]), self.model.text(prev[prefix:])
        if len(text) > len(before) and not text.endswith("\ufffd"):
            prefix, read, text = read, len(prev), text[len(before) :]
        else:
            text = ""
        return text, DetokenizeState(len(all_input_ids), prev, prefix, read)


def _resolve_fingerprint(input_mm):
    return input_mm.get("fingerprint") or hashlib.sha256(input_mm["pixel_values"]).digest()


class ImageEncoder:
    def __init__(self, model_path, backend, vision_config=None, backend_config=None):
        self.executor = ThreadPoolExecutor(max_workers=1)
        self.model = internvl_model()

    def preprocess(self, messages):
        return self.model.preprocess(messages)


def internvl_model():
    def preprocess(self, messages):
        return [*messages, {"role": "preprocess", "content": [{"pixel_values": b"pixels"}, {"pixel_values": b"more"}]}]

    return type("InternVLVisionModel", (), {"__module__": "lmdeploy.vl.model.internvl", "preprocess": preprocess})()


class ArgumentHelper:
    @staticmethod
    def disable_metrics(parser): ...
