"""What a protocol file declares, as plain values that two processes can compare."""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor


def message_fields(message: Descriptor) -> dict[str, Any]:
    """Every field and nested message below one message, as plain values keyed by full name."""
    found: dict[str, Any] = {}
    for each in message.fields:
        kind = each.message_type or each.enum_type
        oneof = each.containing_oneof.name if each.containing_oneof else None
        found[each.full_name] = [each.number, each.type, each.is_repeated, kind.full_name if kind else None, oneof]
    for nested in message.nested_types:
        found |= message_fields(nested)
    for enum in message.enum_types:
        found |= enum_values(enum)
    return found


def enum_values(enum: EnumDescriptor) -> dict[str, Any]:
    """Every value of an enum, keyed by full name."""
    return {f"{enum.full_name}.{value.name}": value.number for value in enum.values}


def dump(file: FileDescriptor) -> dict[str, Any]:
    """Everything a file declares: fields, enum values and rpcs, keyed by full name."""
    found: dict[str, Any] = {}
    for message in file.message_types_by_name.values():
        found |= message_fields(message)
    for enum in file.enum_types_by_name.values():
        found |= enum_values(enum)
    for service in file.services_by_name.values():
        for rpc in service.methods:
            types = [rpc.input_type.full_name, rpc.output_type.full_name]
            found[rpc.full_name] = [*types, rpc.client_streaming, rpc.server_streaming]
    return found
