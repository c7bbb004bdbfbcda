"""Fixtures that several test files share."""

from factory_fixtures import built_digits, digits, onnx_digits, trained_digits  # noqa: F401
