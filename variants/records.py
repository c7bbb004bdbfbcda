"""Records: JSON files that a build leaves beside the variants: each absent, whole, or a sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from variants.model_config import RepositoryError, one_line

T = TypeVar("T")


def read_record_file(path: Path, form: TypeAdapter[T]) -> T | None:
    """What a file says, None where there is none. Raises RepositoryError."""
    try:
        return form.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RepositoryError(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        raise RepositoryError(one_line(error, str(path))) from error
