"""LMDeploy's own logits on the bench's cases, run by the Python of LMDeploy's environment: lmdeploy_logits.py FOLDER PROMPT.json CASES.json OUT.pt

The engine is set up as our launcher sets it up (its configuration classes, its tiling threads, its prompt file); CASES are OpenAI messages.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ["INTERVALE_ENGINE"] = "1"  # the launcher registers when it is read
path = Path(__file__).parents[1] / "src" / "intervale" / "engine" / "lmdeploy_launcher.py"
spec = importlib.util.spec_from_file_location("lmdeploy_launcher", path)
launcher = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = launcher
spec.loader.exec_module(launcher)


def main() -> None:
    folder, prompt, cases, out = sys.argv[1:5]
    launcher.more_tiling_threads(2)
    import torch
    from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
    from lmdeploy.model import ChatTemplateConfig

    engine = TurbomindEngineConfig(session_len=16384, max_batch_size=64, cache_max_entry_count=0.3)
    pipe = pipeline(folder, backend_config=engine, chat_template_config=ChatTemplateConfig.from_json(prompt), log_level="WARNING")
    core = pipe.async_engine
    print("engine", core.backend, flush=True)
    found = {"backend": core.backend}

    async def one(messages: list[dict], new: int) -> dict:
        asked = GenerationConfig(max_new_tokens=new, do_sample=False, ignore_eos=True, output_logits="generation")
        request = await core.preprocess(messages=messages, session_id=pipe.session(), gen_config=asked)
        ids, logits = [], None
        async for piece in core.generate(request, stream_response=True):
            ids += piece.token_ids or []
            logits = piece.logits if piece.logits is not None else logits  # it grows; the last one is whole
        return {"input_ids": list(request.inputs["input_ids"]), "ids": ids, "logits": logits.detach().float().cpu()}

    import asyncio

    for name, case in json.loads(Path(cases).read_text()).items():
        work = asyncio.run_coroutine_threadsafe(one(case["messages"], case["new"]), pipe.internal_thread.loop)
        found[name] = work.result(120)
        print(name, len(found[name]["input_ids"]), "+", len(found[name]["ids"]), flush=True)
        torch.save(found, out)  # after each, so that a timeout loses none
    os._exit(0)  # its teardown costs time and gives nothing


if __name__ == "__main__":
    main()
