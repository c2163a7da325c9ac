"""What pip installs for each trainer. All share the PyTorch of constraints.txt."""

from typing import NamedTuple


class Recipe(NamedTuple):
    """A trainer and what it needs here, often less than it requires; a space is between two requirements."""

    package: str  # pinned
    needs: str = ""  # installed with what they require
    complete: bool = False  # whether the trainer too is installed with what it requires
    build: str = ""  # installed first, for a trainer that comes as source


TRANSFORMERS = "transformers==5.23.0 accelerate==1.15.0"
RECIPES = {
    "wandb": Recipe("wandb==0.31.0", TRANSFORMERS, complete=True),
    "mlflow": Recipe("mlflow==3.17.2", TRANSFORMERS, complete=True),
    "trackio": Recipe("trackio==0.43.0", TRANSFORMERS, complete=True),
    "deepspeed": Recipe(
        "deepspeed==0.19.8",
        f"{TRANSFORMERS} einops hjson msgpack py-cpuinfo pydantic>=2",
        build="setuptools wheel ninja numpy packaging psutil py-cpuinfo tqdm",
    ),
    "llama_factory": Recipe(
        "llamafactory==0.9.5",
        "transformers==5.6.0 accelerate==1.11.0 peft==0.18.1 trl==0.24.0 datasets==4.0.0 av einops fire "
        "hf-transfer omegaconf pydantic tyro<0.9 modelscope sentencepiece tiktoken protobuf matplotlib "
        "pandas scipy",
    ),
    "ms_swift": Recipe(
        "ms-swift==4.6.0",
        "transformers==5.19.* accelerate peft<0.21 trl<1.0 datasets>=4.0,<4.8.5 modelscope addict binpacking "
        "dacite einops json-repair matplotlib pandas pillow scipy tensorboard simplejson importlib-metadata "
        "aiohttp",
    ),
    "torchtune": Recipe("torchtune==0.6.1", "torchao==0.15.0", complete=True),
    "torchtitan": Recipe(
        "torchtitan==0.3.0",
        "torchdata torch_checkpointing datasets<4.8 tokenizers safetensors tyro tensorboard einops pillow "
        "spmd_types==0.2.3 triton==3.9.0",
    ),
    "axolotl": Recipe(
        "axolotl==0.19.0",
        "transformers==5.16.1 accelerate==1.13.0 peft==0.20.0 trl==1.9.0 datasets==4.8.4 "
        "huggingface_hub==1.17.0 tokenizers==0.23.1 addict fire colorama einops evaluate==0.4.1 scipy "
        "art python-dotenv fastcore schedulefree posthog sentencepiece optimum==1.16.2 kernels<0.17 "
        "typer pydantic==2.12.5 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 "
        "triton==3.9.0 wandb requests numba tensorboard bitsandbytes==0.50.2 numpy>=2.1",
    ),
}
