"""Writes the ONNX files of this folder, each with the tools of the packages that it comes from.

    python make.py pnet        # torch, onnx; tqdm, requests; --no-deps: facenet-pytorch==2.6.0, torchvision
    python make.py keras       # tensorflow-cpu==2.21.0, tf2onnx==1.17.0, joblib, lz4; --no-deps: mtcnn==1.0.0
    python make.py direction   # --no-deps: rapidocr-onnxruntime==1.4.4

Install them into an environment of their own. README.md says what each file is, and its licence.
"""

import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

FOLDER = Path(__file__).parent


def pnet() -> None:
    """Export the PNet of facenet-pytorch, which returns a tuple, with torch's exporter."""
    import torch

    # The package imports torchvision, which needs these to be there. Its build for GPUs may not define them.
    for operator in ("nms", "qnms"):
        torch.library.define(
            f"torchvision::{operator}", "(Tensor boxes, Tensor scores, float least) -> Tensor"
        )
    from facenet_pytorch.models.mtcnn import PNet

    torch.onnx.export(
        PNet().eval(),
        (torch.rand(2, 3, 12, 12),),
        FOLDER / "pnet.onnx",
        output_names=["boxes", "scores"],
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )


def keras() -> None:
    """Export mtcnn's PNet, a model of Keras, with tf2onnx."""
    import tensorflow
    import tf2onnx
    from mtcnn.network.pnet import PNet
    from mtcnn.utils.tensorflow import load_weights

    model = PNet()
    model.build()
    model.set_weights(load_weights("pnet.lz4"))
    signature = [tensorflow.TensorSpec((None, 12, 12, 3), tensorflow.float32, name="image")]
    tf2onnx.convert.from_function(
        tensorflow.function(model), signature, opset=18, output_path=str(FOLDER / "pnet-keras.onnx")
    )


def direction() -> None:
    """Copy the classifier of rapidocr-onnxruntime that tells text from text that stands on its head."""
    found = find_spec("rapidocr_onnxruntime")
    assert found is not None
    assert found.origin is not None
    model = Path(found.origin).parent / "models" / "ch_ppocr_mobile_v2.0_cls_infer.onnx"
    shutil.copyfile(model, FOLDER / "direction.onnx")


FILES: dict[str, Callable[[], None]] = {"pnet": pnet, "keras": keras, "direction": direction}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        FILES[name]()
