"""`lmdeploy serve api_server` as shipped, for an official folder: run by the Python of LMDeploy's environment. The folder's configuration classes are
registered, as its remote code would do; nothing else is touched, neither threads nor settings."""

import importlib.util
import os
import sys
from pathlib import Path


def launcher_without_its_settings() -> object:
    """Our launcher as a module, with the environment as it was: its thread counts are for our own starts."""
    before = dict(os.environ)
    path = Path(__file__).parents[1] / "src" / "intervale" / "engine" / "lmdeploy_launcher.py"
    spec = importlib.util.spec_from_file_location("lmdeploy_launcher", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    os.environ.clear()
    os.environ.update(before)
    return module


launcher_without_its_settings().register()

if __name__ == "__main__":
    from lmdeploy.cli import run

    run()
