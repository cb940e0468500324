"""Reading of settings: from the command line, the environment and secret files, each that is wrong by its name."""

import os
import re
from pathlib import Path

from pydantic import ValidationError

from buydesk.errors import CannotStart
from buydesk.settings.model import PREFIX, Settings, variable
from buydesk.settings.secrets import OWNERS, PROVERS, SECRET_KEYS, TOKENS

# What earlier versions knew, and what to set instead.
_RENAMED = {
    f"{PREFIX}INTERNAL_TOKEN": ", ".join(PREFIX + name.upper() for name in TOKENS),
    f"{PREFIX}SOURCE_REST_SECONDS": f"{PREFIX}SOURCE_COOLDOWN_SECONDS",
    f"{PREFIX}SOURCE_REST_SECONDS_MAX": f"{PREFIX}SOURCE_COOLDOWN_SECONDS_MAX",
}
# Where containers find their secrets: a file for each, with the name of the variable it stands for.
SECRETS_DIR = Path("/run/secrets")
# What Kubernetes tells every pod of a Service whose name begins with "buydesk".
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)", re.ASCII
)


def require_secrets(settings: Settings, service: str) -> None:
    """Raises CannotStart for a secret that the service shares with others, and which was not given to it."""
    shared = [name for name in (*TOKENS, *SECRET_KEYS) if service in OWNERS[name]]
    shared += [name for name in PROVERS if service in PROVERS[name]]
    missing = [variable(name) for name in shared if name not in settings.model_fields_set]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise CannotStart(f"{', '.join(missing)} {are} missing: services share them, and `buydesk secrets` makes some")


def read_settings(**overrides: object) -> Settings:
    """The settings of this process: what the command line says, or else its environment, or else a file in SECRETS_DIR.

    Raises CannotStart naming every variable that is unknown or has no sense; never its value, which may be a secret.
    """
    known = {variable(field) for field in Settings.model_fields}
    files = {path.name: path for path in SECRETS_DIR.glob("*")}
    unknown = sorted(name for name in {*os.environ, *files} if name.startswith(PREFIX) and name not in known)
    if unknown:
        mend = "unset it, or see `buydesk serve --help` for names"
        for renamed in _RENAMED.keys() & unknown:
            mend += f"; instead of {renamed} use {_RENAMED[renamed]}"
        if linked := [name for name in unknown if _SERVICE_LINK.fullmatch(name)]:
            mend += (
                f"; Kubernetes sets {linked[0]} for a Service, and does not with enableServiceLinks: false in the pod"
            )
        raise CannotStart(f"unknown setting {', '.join(unknown)}: {mend}")
    secret = {
        field: _secret(files[variable(field)])
        for field in Settings.model_fields
        if variable(field) in files and not os.environ.get(variable(field))
    }
    try:
        return Settings(**{**secret, **overrides})  # type: ignore[arg-type]  # checked by pydantic
    except ValidationError as error:
        raise CannotStart("; ".join(_complaint(each["loc"], each["msg"]) for each in error.errors())) from None


def _secret(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise CannotStart(f"{file.name}: {file} cannot be read: {why}") from error


def _complaint(location: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    if not location:  # about several settings, which it names
        return message
    field = str(location[0])
    name = variable(field) if field in Settings.model_fields else field
    return f"{name}: {message[0].lower()}{message[1:]}"
