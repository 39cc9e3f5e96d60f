"""Stand-ins for what writes a vision model, its calibration and an emulated model, for speed.

What they stand in for has tests of its own, and needs libraries that not every installation has.
"""

import json
import sys
from types import ModuleType, SimpleNamespace


class Config:
    def __init__(self, values):
        self.values = values
        self.quant = SimpleNamespace(
            input_configs=[SimpleNamespace(**each) for each in values["quant"]["input_configs"]]
        )

    def to_json(self):
        inputs = [vars(each) for each in self.quant.input_configs]
        return json.dumps(self.values | {"quant": {"input_configs": inputs}})


def default_config(config, settings, dataset):
    inputs = [{"tensor_name": "image", "calibration_dataset": dataset}]
    return Config(
        {"quant": {"input_configs": inputs}, "chip": settings.chip.chip, "mode": settings.cores}
    )


def load_config(path):
    return Config(json.loads(path.read_text()))


def write_vision_onnx(checkpoint, path, uint8_input=False):
    path.write_bytes(b"onnx")
    return 0.9999987


def write_calibration(checkpoint, source, path, samples=32):
    path.write_bytes(b"tar")
    return samples if source is None else min(samples, len(list(source.iterdir())))


def write_emulated(checkpoint, directory, shape, uint8_input, progress, *, target, post_topk):
    text = checkpoint.config.text
    names = [
        f"{text.model_type}_p{shape.chunk}_l{n}_together.axmodel"
        for n in range(text.num_hidden_layers)
    ]
    size = checkpoint.config.vision.image_size
    names += [f"{text.model_type}_post.axmodel", f"internvl_vit_model_1x3x{size}x{size}.axmodel"]
    directory.mkdir()
    for name in names:
        (directory / name).write_bytes(f"emulated {target} {post_topk}".encode())
        progress(directory / name)


MODULES = {
    "vision": (write_calibration, write_vision_onnx),
    "pulsar2_config": (default_config, load_config),
    "emulate": (write_emulated,),
}


def install(put=sys.modules.__setitem__):
    """Put the modules where they are imported from, with ``put(name, module)``."""
    for name, functions in MODULES.items():
        module = ModuleType(f"edgevl.boards.{name}")
        for function in functions:
            setattr(module, function.__name__, function)
        put(module.__name__, module)
