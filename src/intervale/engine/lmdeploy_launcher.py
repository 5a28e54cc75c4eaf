"""LMDeploy's command line, started for an InternVL folder: run as a file, by the Python of LMDeploy's own environment.

What it adds, and why: the configuration classes of official folders, so that they load without remote code; it must be a FILE, because
LMDeploy's engine processes are spawned and read it again as `__mp_main__`, which registers there too. Threads of the tiling: one in
LMDeploy, which is what holds large pictures up. Changes for speed, in the file beside it. The end of the parent ends it. It imports nothing of
intervale, which is not in that environment.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # its one preprocessing thread otherwise fans out and fights the HTTP loop

# The text model's own type, where the folder's is a name of remote code.
_LLM = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "LlamaForCausalLM": "llama", "Phi3ForCausalLM": "phi3"}

# What the official configuration classes take where a config.json says nothing (OpenGVLab/InternVL, InternLM/InternLM).
_VISION = {
    "num_channels": 3, "patch_size": 14, "qkv_bias": False, "qk_normalization": True, "hidden_act": "gelu", "norm_type": "rms_norm",
    "layer_norm_eps": 1e-6, "dropout": 0.0, "drop_path_rate": 0.0, "attention_dropout": 0.0, "initializer_range": 0.02, "initializer_factor": 0.1,
    "use_flash_attn": False,
}  # fmt: skip
_INTERNLM2 = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "bias": True, "rope_theta": 10000, "rope_scaling": None, "use_cache": True,
    "initializer_range": 0.02, "max_position_embeddings": 2048,
}  # fmt: skip
_CHAT = {
    "select_layer": -1, "force_image_size": None, "downsample_ratio": 0.5, "template": None, "dynamic_image_size": False, "use_thumbnail": False,
    "ps_version": "v1", "min_dynamic_patch": 1, "max_dynamic_patch": 6,
}  # fmt: skip


def register() -> None:
    """Make AutoConfig read 'internvl_chat' as objects with attributes, all of them the folder's own."""
    from transformers import AutoConfig, PretrainedConfig

    def fill(config: Any, usual: dict[str, Any], values: dict[str, Any]) -> None:
        kept = {name: value for name, value in values.items() if name not in ("auto_map", "model_type")}
        for name, value in usual.items():  # before transformers reads them: it makes one of what it knows about rope
            setattr(config, name, kept.get(name, value))
        PretrainedConfig.__init__(config, **kept)
        for name, value in kept.items():
            if not hasattr(config, name):
                setattr(config, name, value)

    # Each with an __init__ of its own: transformers writes one for a class that has none.
    class Vision(PretrainedConfig):
        model_type = "intern_vit_6b"

        def __init__(self, **values: Any) -> None:
            fill(self, _VISION, values)

    class InternLM2(PretrainedConfig):
        model_type = "internlm2"

        def __init__(self, **values: Any) -> None:
            fill(self, _INTERNLM2, values)

    class Chat(PretrainedConfig):
        model_type = "internvl_chat"
        sub_configs: ClassVar[dict[str, Any]] = {}

        def __init__(self, vision_config: Any = None, llm_config: Any = None, **values: Any) -> None:
            # Both may be missing: transformers makes an empty one when it compares configurations.
            self.vision_config = vision_config if isinstance(vision_config, PretrainedConfig) else Vision(**(vision_config or {}))
            self.llm_config = llm_config if isinstance(llm_config, PretrainedConfig) else text(llm_config or {})
            fill(self, _CHAT, values)

        def to_dict(self) -> dict[str, Any]:
            return super().to_dict() | {"vision_config": self.vision_config.to_dict(), "llm_config": self.llm_config.to_dict()}

    def text(values: dict[str, Any]) -> Any:
        arch = (values.get("architectures") or [""])[0]
        if arch in _LLM:
            return AutoConfig.for_model(_LLM[arch], **{name: value for name, value in values.items() if name != "model_type"})
        return InternLM2(**values)

    AutoConfig.register("internvl_chat", Chat, exist_ok=True)


def more_tiling_threads(count: int) -> bool:
    """Let `count` pictures be tiled at once; False when this LMDeploy is built otherwise, which is then said."""
    import lmdeploy.vl.engine as module

    encoder = getattr(module, "ImageEncoder", None)
    if encoder is None:
        return False
    made = encoder.__init__

    @functools.wraps(made)  # its parameters stay readable
    def make(self: Any, *words: Any, **named: Any) -> None:
        made(self, *words, **named)
        if isinstance(getattr(self, "executor", None), ThreadPoolExecutor):
            self.executor = ThreadPoolExecutor(max_workers=count)

    encoder.__init__ = make
    return True


def faster(backend: str) -> None:
    """Make the changes of lmdeploy_patches.py, found by its path: Python may have been told to leave a script's folder out of sys.path."""
    spec = importlib.util.spec_from_file_location("lmdeploy_patches", Path(__file__).with_name("lmdeploy_patches.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["lmdeploy_patches"] = importlib.util.module_from_spec(spec)  # there, or its dataclass has no module
    spec.loader.exec_module(module)
    module.apply(backend)


def end_with_parent() -> None:
    """Leave when the pipe on stdin closes: whoever started this is gone, however it went."""

    def watch() -> None:
        # Not through sys.stdin: Python takes its lock when it ends, and this thread would still hold it.
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


if "INTERVALE_ENGINE" in os.environ:  # also in the spawned processes
    register()

if __name__ == "__main__":
    end_with_parent()
    if not more_tiling_threads(int(os.environ.get("INTERVALE_TILING_THREADS", "2"))):
        print("intervale: this LMDeploy tiles pictures in another way; its tiling threads stay as they are", flush=True)
    faster(dict(zip(sys.argv, sys.argv[1:], strict=False)).get("--backend", ""))  # only here: what is changed runs in this process
    if key := os.environ.pop("INTERVALE_ENGINE_KEY", ""):
        sys.argv += ["--api-keys", key]  # not on the command line that others on this machine can read
    from lmdeploy.cli import run

    run()
