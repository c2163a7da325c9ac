"""The hub of Hugging Face, which a machine without a network does not wait for."""

from functools import cache

CONNECT = 5.0  # seconds until a hub that does not answer counts as out of reach


@cache
def reach_hub() -> bool:
    """Whether the hub answers. If it does not, the libraries use what they have downloaded, and nothing else.

    Without this, each of them would try six times over half a minute.
    """
    import datasets
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT)
        return True
    except Exception:  # of the library below, which has changed
        constants.HF_HUB_OFFLINE = True
        datasets.config.HF_HUB_OFFLINE = True
        return False
