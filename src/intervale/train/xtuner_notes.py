"""What `import-xtuner` has to say, in both languages: where the defaults differ, and why something has no counterpart.

Every difference here was read from XTuner's code (v0.1.23) or is a decision of ours; docs/xtuner.md explains them.
"""

from __future__ import annotations

from intervale.core.lang import say

DIFFERENT: dict[str, tuple[str, str]] = {
    "quantize": (
        "4-bit base: bitsandbytes' NF4 in both, with float16 arithmetic there and the recipe's precision here; "
        "with memory to spare, lora.quantize: none trains on the base as it is",
        "4 位基座：两者都用 bitsandbytes 的 NF4，XTuner 以 float16 计算，这里按配方的精度；显存足够时，lora.quantize: none 在原精度的基座上训练",
    ),
    "head": (
        "target_modules None: XTuner's LoRA also reaches the output layer (InternLM2 calls it `output`); so does the recipe (targets: llm+head)",
        "target_modules 为 None：XTuner 的 LoRA 也作用于输出层（InternLM2 称之为 `output`）；配方与之相同（targets: llm+head）",
    ),
    "template": (
        "system text: XTuner trains with its own (InternLM's) and the tutorial serves with another; here the model's own template serves both",
        "系统提示：XTuner 训练时用自己的（InternLM 的），教程部署时用另一个；这里两处都用模型自带的模板",
    ),
    "length": (
        "max_length: XTuner cuts the rest off (pictures too) and goes on; here a longer item is refused before the run starts",
        "max_length：XTuner 截断超出部分（包括图片）并继续；这里超长的数据在训练开始前就会被拒绝",
    ),
    "pictures": (
        "pictures: XTuner puts <image> first in its turn (`prepare llava` does too, and tells where it does not) and replaces an unreadable "
        "picture's item by a random other one; here it stops the run, or is listed and left out (data.on_bad_sample)",
        "图片：XTuner 把 <image> 移到该轮开头（`prepare llava` 也如此，例外会说明），并用随机的另一条数据替换图片无法读取的数据；"
        "这里会停止训练，或列出并跳过（data.on_bad_sample）",
    ),
    "mean": (
        "loss: XTuner averages the means of {count} micro-batches; here every target token of the step weighs the same",
        "损失：XTuner 对 {count} 个微批各自的均值再取平均；这里一步中的每个目标 token 权重相同",
    ),
    "decay": (
        "weight decay: XTuner decays everything that learns; here norms and biases do not decay",
        "权重衰减：XTuner 对所有可训练参数衰减；这里归一化层和偏置不衰减",
    ),
    "precision": (
        "float16 with loss scaling -> bfloat16 without (float32 where the device has no bfloat16); what learns is kept in float32",
        "float16 加损失缩放 -> bfloat16，无缩放（设备不支持时用 float32）；可训练参数保持 float32",
    ),
    "warmup": (
        "warm-up: XTuner raises the rate per micro-batch from almost 0; here per optimizer step, the first one not 0",
        "预热：XTuner 按微批从接近 0 升高学习率；这里按优化步，第一步不为 0",
    ),
    "save": (
        "interval {micro} counts micro-batches -> {steps} optimizer steps; a checkpoint here also holds the optimizer, so that --resume is exact",
        "interval {micro} 按微批计 -> {steps} 个优化步；这里的检查点还包含优化器状态，因此 --resume 是精确的",
    ),
    "seed": (
        "seed: XTuner draws one when none is given; here it is always fixed ({seed})",
        "种子：XTuner 未指定时随机产生；这里始终固定（{seed}）",
    ),
}
# Values that change nothing here: nobody needs to read about them.
NO_EFFECT: dict[str, object] = {
    "model.llm_lora.task_type": "CAUSAL_LM",
    "model.llm_lora.target_modules": None,
    "model.llm_lora.bias": "none",
    "model.visual_encoder_lora.target_modules": None,
    "model.visual_encoder_lora.bias": "none",
    "model.llm_lora": None,
    "model.visual_encoder_lora": None,
    "model.quantization_llm": False,
    "model.quantization_vit": False,
    "model.pretrained_pth": None,
    "optim_wrapper.clip_grad.error_if_nonfinite": False,
    "load_from": None,
    "resume": False,
    "visualizer": None,
    "randomness.seed": None,
    "randomness.deterministic": False,
    "default_hooks.checkpoint.save_optimizer": False,
}
_REASONS: dict[str, tuple[str, str]] = {
    "model.quantization_llm": (
        "4-bit base weights: a recipe has them under LoRA alone (lora.quantize)",
        "4 位基座权重：配方只在 LoRA 下使用（lora.quantize）",
    ),
    "model.quantization_vit": (
        "4-bit tower: the recipe's has 16 bits, which takes more memory",
        "4 位视觉塔：配方使用 16 位，占用更多显存",
    ),
    "model.pretrained_pth": (
        "start from it: `intervale import-checkpoint`, then `export`, and name the exported folder as `model`",
        "从它开始：先 `intervale import-checkpoint`，再 `export`，并把导出的文件夹写为 `model`",
    ),
    "load_from": (
        "start from it: `intervale import-checkpoint`, then `export`, and name the exported folder as `model`",
        "从它开始：先 `intervale import-checkpoint`，再 `export`，并把导出的文件夹写为 `model`",
    ),
    "resume": (
        "XTuner's optimizer state cannot be continued; `train --resume` continues our own runs",
        "无法接续 XTuner 的优化器状态；`train --resume` 接续我们自己的训练",
    ),
    "train_dataloader.sampler": (
        "items come in an order drawn from the seed; rows are packed, so nothing is gained by grouping lengths",
        "数据顺序由种子决定；样本打包，无需按长度分组",
    ),
    "train_dataloader.collate_fn": ("rows are packed without padding", "样本打包，无填充"),
    "custom_hooks": (
        "`intervale check --show 2` prints items as the model sees them; `data.eval` and `intervale evaluate` score it",
        "`intervale check --show 2` 按模型所见显示数据；`data.eval` 和 `intervale evaluate` 负责评测",
    ),
    "tokenizer": ("the model folder's own is used, without remote code", "使用模型文件夹自带的分词器，不执行远程代码"),
    "optim_wrapper.loss_scale": ("bfloat16 needs no loss scaling", "bfloat16 无需损失缩放"),
    "optim_wrapper.optimizer": ("AdamW's own default is used", "使用 AdamW 的默认值"),
    "default_hooks": ("every step is a line of metrics.jsonl and a point of loss.png", "每一步都写入 metrics.jsonl 并画在 loss.png 上"),
    "env_cfg": (
        "several processes: parallel.strategy and parallel.processes, or torchrun",
        "多进程：parallel.strategy 和 parallel.processes，或由 torchrun 启动",
    ),
    "visualizer": ("loss.png and metrics.jsonl", "loss.png 与 metrics.jsonl"),
    "log_level": ("progress goes to stderr", "进度输出到 stderr"),
    "log_processor": ("every step is logged", "每一步都有记录"),
    "randomness": ("order, fresh LoRA matrices and dropout follow from train.seed", "数据顺序、LoRA 初值和 dropout 由 train.seed 决定"),
    "launcher": (
        "several processes: parallel.strategy and parallel.processes, or torchrun",
        "多进程：parallel.strategy 和 parallel.processes，或由 torchrun 启动",
    ),
    "work_dir": ("`out` (or --out) names the run's folder", "训练文件夹由 `out`（或 --out）指定"),
}


def reason_for(path: str) -> tuple[str, str]:
    """(the longest known prefix of a config's path, why it has no counterpart); the path itself when it is not known."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        prefix = ".".join(parts[:end])
        if prefix in _REASONS:
            return prefix, say(*_REASONS[prefix])
    return path, say("not known here: nothing in the recipe stands for it", "未知设置：配方中没有对应")
