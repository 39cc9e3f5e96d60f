"""Check what is in the wheel: package, native engine and shipped model, not its training data."""

import sys
import zipfile
from pathlib import Path

MODEL = "edgevl/models/tiny/"
NEEDED = {
    "edgevl/__init__.py",
    "edgevl/py.typed",
    "edgevl/quantize/report.html.jinja",
    "edgevl/quantize/calibration/pictures.tar",
    "edgevl/quantize/calibration/questions.json",
    "edgevl/synth/chat_template.jinja",
    "edgevl/synth/internvl.json.jinja",
    "edgevl/synth/internvl_chat.json.jinja",
    "edgevl/synth/presets.json",
    "edgevl/page/page.css",
    "edgevl/page/page.js",
    f"{MODEL}config.json",
    f"{MODEL}tokenizer.json",
}
UNWANTED = (f"{MODEL}heldout/", f"{MODEL}training/", "tests/")
MAX_BYTES = 6_000_000

path = Path(sys.argv[1])
names = set(zipfile.ZipFile(path).namelist())
size = path.stat().st_size
print(f"{path.name}: {size / 1e6:.1f} MB, {len(names)} files")

problems = [f"{name} is missing" for name in sorted(NEEDED - names)]
if not any(name.startswith(MODEL) and name.endswith(".safetensors") for name in names):
    problems.append(f"{MODEL}*.safetensors is missing")
if not any(name.startswith("edgevl/_native.") and name.endswith(".so") for name in names):
    problems.append("edgevl/_native.*.so is missing: the native engine was not built")
problems += [f"{name} does not belong" for name in sorted(names) if name.startswith(UNWANTED)]
for library in ("ax_sys", "ax_engine", "axcl_rt"):
    if f"edgevl/emulator/lib{library}.so" not in names:
        problems.append(f"edgevl/emulator/lib{library}.so is missing: no NPU emulator")
if size > MAX_BYTES:
    problems.append(f"larger than {MAX_BYTES / 1e6:.0f} MB")
sys.exit("\n".join(problems) or 0)
