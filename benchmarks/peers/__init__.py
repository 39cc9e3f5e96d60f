"""The peers. To add one: a file with a `Peer`, its name here, its stacks in ``stacks.py``."""

from peers.base import Peer
from peers.edgevl import EdgeVL
from peers.llama_cpp import LlamaCpp, LlamaCppAVX2
from peers.onnxruntime import ONNXRuntime
from peers.openvino import OpenVINO
from peers.pytorch import PyTorch

#: Peers by name.
PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (EdgeVL, OpenVINO, ONNXRuntime, LlamaCpp, LlamaCppAVX2, PyTorch)
}
