"""Does the Hugging Face Hub answer? Asked once, with a limit: its client tries five times more, for 23 s.
Imports no torch.
"""

import functools
import threading

SECONDS = 4  # in which any answer counts, be it an error


def is_id(name: str) -> bool:
    """Can `name` be a repository of the hub (owner/name)? A path cannot."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def silent() -> str:
    """Why the hub cannot be asked (`huggingface.co does not answer`); empty where it answers."""
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE forbids to ask the hub"
    return _silent(constants.ENDPOINT)


@functools.cache
def _silent(endpoint: str) -> str:
    from huggingface_hub.utils import get_session

    said = [f"no answer in {SECONDS} s"]

    def ask() -> None:
        try:
            get_session().head(endpoint, timeout=SECONDS)
            said.append("")
        except Exception as error:  # of the HTTP library, whichever the installed hub client has
            said.append((str(error) or type(error).__name__).splitlines()[0])

    # A resolver that is not there keeps its caller for longer than any timeout of the request.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(SECONDS)
    return said[-1] and f"{endpoint.split('//')[-1]} cannot be reached ({said[-1]})"
