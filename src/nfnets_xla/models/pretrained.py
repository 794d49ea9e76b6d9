"""Public weights of NFNets: DeepMind's F0 to F6, trained on ImageNet. There are no others.

`dm_in1k` is timm's .safetensors copy on the Hugging Face Hub, fetched by `huggingface_hub`, so that
the Hub's cache, mirrors and `HF_HUB_OFFLINE` work as usual. `dm_in1k_haiku` is the pickle that
DeepMind published, from DeepMind's own address.
"""

from pathlib import Path

from nfnets_xla.models.download import download
from nfnets_xla.models.published import HAIKU_TAG, IMAGENET, TAG

HUB_REPOSITORY = "timm/dm_{name}." + TAG
HUB_FILE = "model.safetensors"
DEEPMIND = "https://storage.googleapis.com/dm-nfnets/F{number}_haiku.npz"


def fetch_pretrained(name: str, tag: str | None = None) -> Path:
    """The file of a model's public weights, fetched if not cached. ValueError if there are none."""
    if name not in IMAGENET:
        raise ValueError(
            f"{name} has no public weights; there are those of {', '.join(IMAGENET)} "
            f"(tags {TAG} and {HAIKU_TAG}), trained on ImageNet; none of F7, of a + model or of JFT"
        )
    if tag == HAIKU_TAG:
        number = name.removeprefix("nfnet_f")
        return download(DEEPMIND.format(number=number))
    return _from_hub(HUB_REPOSITORY.format(name=name))


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repository, HUB_FILE))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{repository} is neither in the Hugging Face cache nor available ({first}): go online "
            "and unset HF_HUB_OFFLINE, or give checkpoint_path, a file you have"
        ) from None
