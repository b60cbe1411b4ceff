"""Run exported folders in another program, and write the logits.

Usage: python read_models.py READER JOBS.json. Runs in the environment of `tests/run.sh --readers`,
which has other versions than the one that runs the tests. A job is {folder, tokens, work}: tokens is a
list of ids; work is a folder for the converted model and the result, logits.npy or error.txt. Each job
runs in a forked process, because a program that does not accept a model may abort.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import transformers


def transformers_4(folder: Path, tokens: list[int], work: Path) -> np.ndarray:
    assert transformers.__version__.startswith("4."), transformers.__version__
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    # transformers only warns about weights that are missing, unknown or of another shape.
    assert not any(report.values()), report
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def llama_cpp(folder: Path, tokens: list[int], work: Path) -> np.ndarray:
    from llama_cpp import GGML_TYPE_F32, Llama

    converter = os.environ["MINITRON_LLAMA_CPP_CONVERTER"]
    gguf = str(work / "model.gguf")
    words = [converter, str(folder), "--outtype", "f32", "--outfile", gguf]
    with (
        patch.object(sys, "argv", words),
        patch.object(sys, "path", [str(Path(converter).parent), *sys.path]),
    ):
        runpy.run_path(converter, run_name="__main__")
    model = Llama(
        gguf,
        n_ctx=len(tokens) + 8,
        n_batch=len(tokens),
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )
    model.eval(tokens)
    return np.array(model.scores[: len(tokens)])


def ctranslate2(folder: Path, tokens: list[int], work: Path) -> np.ndarray:
    from ctranslate2 import Generator
    from ctranslate2.converters import TransformersConverter

    out = work / "ctranslate2"
    TransformersConverter(str(folder)).convert(str(out))
    return np.array(Generator(str(out), compute_type="float32").forward_batch([tokens]))[0]


READERS: dict[str, Callable[[Path, list[int], Path], np.ndarray]] = {
    "transformers 4": transformers_4,
    "llama.cpp": llama_cpp,
    "CTranslate2": ctranslate2,
}


def run(reader: str, job: dict[str, Any]) -> None:
    """Run one job and write its result. A program that aborts leaves no result."""
    work = Path(job["work"])
    try:
        logits = READERS[reader](Path(job["folder"]), job["tokens"], work)
        np.save(work / "logits.npy", logits.astype(np.float32))
    except BaseException as error:  # the result of a model that the program does not accept
        (work / "error.txt").write_text(f"{type(error).__name__}: {error}")


def main(reader: str, file: str) -> None:
    with contextlib.suppress(ImportError):
        __import__({"llama.cpp": "llama_cpp"}.get(reader, reader.split()[0].lower()))  # before the forks
    for job in json.loads(Path(file).read_text()):
        child = os.fork()
        if child == 0:
            run(reader, job)
            sys.stdout.flush()
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
