#!/usr/bin/env bash
# Exports tiny embedders of both families and loads them in sentence-transformers 5.3 and 6.2, each in a throw-away
# environment of its own; every vector must equal that of the Megatron encoder.
#
#   benchmarks/consumers.sh [VERSION …]        # default: 5.3.0 6.2.0; PYTHON names the project's interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$PWD/.venv/bin/python}
VERSIONS=("$@")
[ $# -gt 0 ] || VERSIONS=(5.3.0 6.2.0)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2 TRANSFORMERS_VERBOSITY=error

cat > "$WORK/texts.json" <<'EOF'
["how do plants eat?", "a  b [INST]</s> c", "ünïcödé 漢字", "one two three four five six seven eight nine ten eleven"]
EOF

PYTHONPATH=tests "$PYTHON" -W ignore - "$WORK" <<'EOF'
import json, sys
from pathlib import Path

import numpy as np
from support import tiny_families, tiny_models

from megatron_embed.conversion.exporting import export_hf
from megatron_embed.conversion.importing import import_hf
from megatron_embed.recipes import Encoder

work = Path(sys.argv[1])
texts = json.loads((work / "texts.json").read_text())
for name, save in {"ministral3": tiny_models.save_vlm, "llama": tiny_families.save_llama}.items():
    save(work / "source")
    import_hf(work / "source", work / "megatron", tp=2, progress=False)
    export_hf(work / "megatron", work / name, progress=False)
    with Encoder.from_pretrained(work / "megatron", device="cpu") as encoder:
        for kind in ("query", "passage"):
            np.save(work / f"{name}-{kind}.npy", encoder.encode(texts, kind))
    for folder in ("source", "megatron"):
        (work / folder).rename(work / f"{name}-{folder}")
EOF

cat > "$WORK/load.py" <<'EOF'
import json, sys
from pathlib import Path

import numpy as np
import sentence_transformers, torch, transformers
from sentence_transformers import SentenceTransformer

work = Path(sys.argv[1])
texts = json.loads((work / "texts.json").read_text())
versions = f"sentence-transformers {sentence_transformers.__version__}, transformers {transformers.__version__}"
for name in ("ministral3", "llama"):
    model = SentenceTransformer(str(work / name), device="cpu", local_files_only=True)
    assert type(model[0].auto_model).__name__ == {"ministral3": "Ministral3Model", "llama": "LlamaModel"}[name]
    for kind, prompt in (("query", "query"), ("passage", "document")):
        found = model.encode(texts, prompt_name=prompt)
        wanted = np.load(work / f"{name}-{kind}.npy")
        largest = np.abs(found - wanted).max()
        print(f"{versions}, torch {torch.__version__}: {name} {kind}: largest difference {largest:.1e}")
        assert found.shape == wanted.shape and largest <= 1e-6, (found, wanted)
EOF

for version in "${VERSIONS[@]}"; do
    "$PYTHON" -m venv "$WORK/venv-$version"
    pip=("$WORK/venv-$version/bin/pip" install --quiet --disable-pip-version-check)
    # torch first and pinned: left to itself, pip takes gigabytes of CUDA wheels
    "${pip[@]}" "$(grep ^torch== constraints.txt)"
    "${pip[@]}" "$(grep ^torch== constraints.txt)" "sentence-transformers==$version"
    "$WORK/venv-$version/bin/python" -W ignore "$WORK/load.py" "$WORK"
    rm -rf "$WORK/venv-$version"
done
echo "every version embeds as the Megatron encoder does"
