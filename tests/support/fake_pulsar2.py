#!/usr/bin/env python3
"""Stands in for Pulsar2 in tests: strict about its command line, quick, and able to fail.

The environment says how it behaves: FAKE_VERSION; FAKE_FAIL, a JSON object of build (vision, text)
-> [lines to print, exit status, files to write first]; FAKE_SLOW, the build that waits for ever
after its first file; FAKE_COSINE of a layer; FAKE_MISSING, a file that is not written; FAKE_CALLS,
a file that each call is noted in; FAKE_LINGER, for one that has done all and does not exit.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

VERSION = os.environ.get("FAKE_VERSION", "5.1")
FAIL = json.loads(os.environ.get("FAKE_FAIL", "{}"))


def main():
    name, *arguments = sys.argv[1:]
    if name == "version":
        print(f"version: {VERSION}\ncommit: 0fdbfe15")
        return 0
    if name == "llm_build2" and int(VERSION.split(".")[0]) < 6:
        print("invalid choice: 'llm_build2'", file=sys.stderr)
        return 2
    if "--help" in arguments:
        return 0
    with Path(os.environ["FAKE_CALLS"]).open("a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    assert os.environ["FLOAT_MATMUL_USE_CONV_EU"] == "1"
    return {"build": vision, "llm_build": text_1, "llm_build2": text_2}[name](arguments)


def parser():
    return argparse.ArgumentParser(allow_abbrev=False, exit_on_error=True)


def vision(arguments):
    options = parser()
    options.add_argument("--input", required=True, type=Path)
    options.add_argument("--config", required=True, type=Path)
    options.add_argument("--output_dir", required=True, type=Path)
    options.add_argument("--output_name", required=True)
    options.add_argument("--npu_mode", required=True, choices=["NPU1", "NPU2", "NPU3"])
    options.add_argument("--target_hardware", required=True, choices=["AX650", "AX620E"])
    given = options.parse_args(arguments)
    assert given.input.stat().st_size > 0
    config = json.loads(given.config.read_text())
    dataset = config["quant"]["input_configs"][0]["calibration_dataset"]
    assert Path(dataset).is_file(), dataset
    return build("vision", given.output_dir, [given.output_name], "tiling op...")


def text_options():
    options = parser()
    options.add_argument("--input_path", required=True, type=Path)
    options.add_argument("--output_path", required=True, type=Path)
    options.add_argument("--hidden_state_type", required=True, choices=["bf16"])
    options.add_argument("--prefill_len", required=True, type=int)
    options.add_argument("--weight_type", choices=["s8", "s4"])
    options.add_argument("--post_topk", type=int)
    options.add_argument("--npu_mode", choices=["NPU1", "NPU2", "NPU3"])
    options.add_argument("--chip", required=True, choices=["AX650", "AX620E"])
    options.add_argument("--check_level", required=True, type=int, choices=[0, 1, 2])
    options.add_argument("--parallel", required=True, type=int)
    return options


def text_1(arguments):
    options = text_options()
    options.add_argument("--kv_cache_len", required=True, type=int)
    options.add_argument("--last_kv_cache_len", type=int, action="append", default=[])
    given = options.parse_args(arguments)
    lengths = [given.prefill_len * (n + 1) for n in range(len(given.last_kv_cache_len))]
    assert given.last_kv_cache_len == lengths
    return text(given, given.prefill_len)


def text_2(arguments):
    options = text_options()
    options.add_argument("--prefill_step_size", required=True, type=int)
    options.add_argument("--max_context", required=True, type=int)
    options.add_argument("--decode_step_size", type=int)
    options.add_argument("--post_weight_type", required=True, choices=["s8"])
    options.add_argument("--model_config", type=Path)
    given = options.parse_args(arguments)
    assert given.prefill_len % given.prefill_step_size == 0
    assert given.prefill_len <= given.max_context
    if json.loads((given.input_path / "config.json").read_text())["model_type"] == "qwen3":
        expected = {"use_qk_norm": True, "qk_norm_after_rope": False}
        assert json.loads(given.model_config.read_text()) == expected
    return text(given, given.prefill_step_size)


def text(given, chunk):
    config = json.loads((given.input_path / "config.json").read_text())
    quantized = "quantization_config" in config
    assert quantized == (given.weight_type is None)
    assert (given.input_path / "model.safetensors").is_file()
    kind = config["model_type"]
    names = [f"{kind}_p{chunk}_l{n}_together.axmodel" for n in range(config["num_hidden_layers"])]
    log("prepare llm model done!")
    names.append(f"{kind}_post.axmodel")
    status = build("text", given.output_path, names, "building llm decode layers")
    if status:
        return status
    log("build llm model done!")
    if given.check_level:
        cosine = os.environ.get("FAKE_COSINE", "0.9986067835921196")
        log(f"decode layer0_gt layer0_got cos_sim is: {cosine}")
        log("prefill layer0_gt layer0_got cos_sim is: 0.9975")
    if "check" in FAIL:
        print(FAIL["check"][0])
        return FAIL["check"][1]
    log("check llm model done!")
    if "FAKE_LINGER" in os.environ:
        time.sleep(600)
    return 0


def build(name, output, files, bar):
    lines, status, count = FAIL.get(name, ["", 0, len(files)])
    for number, file in enumerate(files[:count]):
        if file != os.environ.get("FAKE_MISSING"):
            (output / file).write_bytes(f"{name} {file}".encode())
        print(f"\r{bar}   \u2501\u2501\u2501\u2578\u2501 {number + 1}/{len(files)} 0:00:01", end="")
        if os.environ.get("FAKE_SLOW") == name:
            print()
            time.sleep(600)
    print()
    if lines:
        print(lines)
    if name in FAIL and status < 0:
        os.kill(os.getpid(), -status)
    return status if name in FAIL else 0


def log(text):
    print(f"2026-03-23 21:05:42.252 | SUCCESS  | yamain.command.llm_build:llm_build:258 - {text}")


if __name__ == "__main__":
    sys.exit(main())
