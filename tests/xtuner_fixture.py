"""XTuner's side of the fence, made up: a config of the tutorial's form and a checkpoint of the form its hook writes."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

LEAVES = ("attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

# The tutorial's values in the form of internvl_v2_internlm2_2b_lora_finetune.py, in our own words.
CONFIG = """\
from mmengine.hooks import CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR, LinearLR
from peft import LoraConfig
from torch.optim import AdamW
from transformers import AutoTokenizer
from xtuner.dataset import InternVL_V1_5_Dataset
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.dataset.samplers import LengthGroupedSampler
from xtuner.engine.hooks import DatasetInfoHook
from xtuner.engine.runner import TrainLoop
from xtuner.model import InternVL_V1_5
from xtuner.utils import PROMPT_TEMPLATE

path = 'MODEL'
data_root = 'ROOT/'
data_path = data_root + 'sivqa_llava.json'
image_folder = data_root
prompt_template = PROMPT_TEMPLATE.internlm2_chat
max_length = 8192
batch_size = 4
accumulative_counts = 2
dataloader_num_workers = 4
max_epochs = 10
optim_type = AdamW
lr = 3e-5
betas = (0.9, 0.999)
weight_decay = 0.05
max_norm = 1
warmup_ratio = 0.03
save_steps = 64
save_total_limit = -1

model = dict(
    type=InternVL_V1_5, model_path=path, freeze_llm=True, freeze_visual_encoder=True,
    llm_lora=dict(type=LoraConfig, r=128, lora_alpha=256, lora_dropout=0.05, target_modules=None, task_type='CAUSAL_LM'))
llava_dataset = dict(
    type=InternVL_V1_5_Dataset, model_path=path, data_paths=data_path, image_folders=image_folder, template=prompt_template,
    max_length=max_length)
train_dataloader = dict(
    batch_size=batch_size, num_workers=dataloader_num_workers, dataset=llava_dataset,
    sampler=dict(type=LengthGroupedSampler, length_property='modality_length', per_device_batch_size=batch_size * accumulative_counts),
    collate_fn=dict(type=default_collate_fn))
optim_wrapper = dict(
    type=AmpOptimWrapper, optimizer=dict(type=optim_type, lr=lr, betas=betas, weight_decay=weight_decay),
    clip_grad=dict(max_norm=max_norm, error_if_nonfinite=False), accumulative_counts=accumulative_counts, loss_scale='dynamic',
    dtype='float16')
param_scheduler = [
    dict(type=LinearLR, start_factor=1e-5, by_epoch=True, begin=0, end=warmup_ratio * max_epochs, convert_to_iter_based=True),
    dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, begin=warmup_ratio * max_epochs, end=max_epochs, convert_to_iter_based=True),
]
train_cfg = dict(type=TrainLoop, max_epochs=max_epochs)
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path=path, trust_remote_code=True)
custom_hooks = [dict(type=DatasetInfoHook, tokenizer=tokenizer)]
default_hooks = dict(
    timer=dict(type=IterTimerHook), logger=dict(type=LoggerHook, log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, save_optimizer=False, by_epoch=False, interval=save_steps, max_keep_ckpts=save_total_limit),
    sampler_seed=dict(type=DistSamplerSeedHook))
env_cfg = dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0), dist_cfg=dict(backend='nccl'))
visualizer = None
log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=None, deterministic=False)
log_processor = dict(by_epoch=False)
"""


def write_config(folder: Path, model: Path | str = "OpenGVLab/InternVL2-2B", root: Path | str = "food", **changes: str) -> Path:
    """The tutorial's config; `changes` replaces the right side of assignments at the top."""
    text = CONFIG.replace("MODEL", str(model)).replace("ROOT", str(root))
    for name, value in changes.items():
        lines = [f"{name} = {value}" if line.startswith(f"{name} = ") else line for line in text.split("\n")]
        assert lines != text.split("\n"), name
        text = "\n".join(lines)
    (folder / "tutorial.py").write_text(text)
    return folder / "tutorial.py"


def xtuner_state(base: Path, rank: int = 4, head: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random LoRA on every layer's linears (and the head) and a whole projector, under XTuner's names."""
    weights = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    state: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        inner = name.removeprefix("language_model.").removesuffix(".weight")
        if name.startswith("language_model.") and (inner.endswith(LEAVES) or (head and inner == "output")):
            layer = f"model.language_model.base_model.model.{inner}"
            state[f"{layer}.lora_A.default.weight"] = draw(rank, weight.shape[1])
            state[f"{layer}.lora_B.default.weight"] = draw(weight.shape[0], rank)
        if name.startswith("mlp1."):
            state[f"model.{name}"] = weight + draw(*weight.shape)
    return state


def merged_officially(base: Path, state: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """W + scale B A on the official (fused) matrices, and the projector as it is: what merge_and_unload does, in float32."""
    weights = load_file(base / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith("lora_A.default.weight"):
            target = name.removeprefix("model.language_model.base_model.model.").removesuffix(".lora_A.default.weight")
            weights[f"language_model.{target}.weight"] += scale * state[name.replace("lora_A", "lora_B")] @ tensor
        elif name.startswith("model.mlp1."):
            weights[name.removeprefix("model.")] = tensor
    return weights


def write_pth(path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, config: str | None = None) -> Path:
    """`state` as mmengine's CheckpointHook writes it: meta and a log history of its own class beside the tensors."""
    names = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer")
    modules = [types.ModuleType(name) for name in names]

    def mean(self: object) -> None: ...

    mean.__module__, mean.__qualname__ = names[2], "HistoryBuffer.mean"
    history: Any = type("HistoryBuffer", (), {"__module__": names[2], "mean": mean})
    modules[2].HistoryBuffer = history  # type: ignore[attr-defined]
    buffer = history()
    buffer.__dict__ |= {
        "_log_history": np.arange(3.0),
        "_count_history": np.ones(3),
        "last": np.float64(0.5),
        "methods": {"mean": history.mean},
    }
    meta = {"iter": 640, "epoch": 10, "seed": 7} | ({"cfg": config} if config else {})
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setitem(sys.modules, module.__name__, module)
        torch.save(
            {"state_dict": state, "meta": meta, "message_hub": {"log_scalars": {"train/loss": buffer}}, "param_schedulers": [{}]}, path
        )
    return path
