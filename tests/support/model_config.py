"""The part of Triton's model_config.proto that the exported configuration uses: names, types and labels as there,
written down anew; numbers of fields, which the text format does not have, are of no meaning.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

TYPES = ("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32", "TYPE_STRING")
KINDS = ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")
# message -> field -> (type, whether it is repeated)
MESSAGES: dict[str, dict[str, tuple[str, bool]]] = {
    "ModelInput": {
        "name": ("string", False), "data_type": ("DataType", False), "dims": ("int64", True),
        "optional": ("bool", False),
    },
    "ModelOutput": {"name": ("string", False), "data_type": ("DataType", False), "dims": ("int64", True)},
    "ModelInstanceGroup": {"name": ("string", False), "kind": ("Kind", False), "count": ("int32", False)},
    "ModelParameter": {"string_value": ("string", False)},
    "ParametersEntry": {"key": ("string", False), "value": ("ModelParameter", False)},
    "ModelConfig": {
        "name": ("string", False), "platform": ("string", False), "backend": ("string", False),
        "max_batch_size": ("int32", False), "input": ("ModelInput", True), "output": ("ModelOutput", True),
        "instance_group": ("ModelInstanceGroup", True), "parameters": ("ParametersEntry", True),
    },
}  # fmt: skip
SCALARS = {
    "string": descriptor_pb2.FieldDescriptorProto.TYPE_STRING,
    "int32": descriptor_pb2.FieldDescriptorProto.TYPE_INT32,
    "int64": descriptor_pb2.FieldDescriptorProto.TYPE_INT64,
    "bool": descriptor_pb2.FieldDescriptorProto.TYPE_BOOL,
}
ENUMERATIONS = {"DataType": TYPES, "Kind": KINDS}


def model_config() -> Any:
    """An empty ModelConfig."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference", syntax="proto3")
    for name, labels in ENUMERATIONS.items():
        enumeration = file.enum_type.add(name=name)
        for number, label in enumerate(labels):
            enumeration.value.add(name=label, number=number)
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, (kind, repeated)) in enumerate(fields.items(), 1):
            row = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if kind in SCALARS:
                row.type = SCALARS[kind]
            else:
                row.type = row.TYPE_ENUM if kind in ENUMERATIONS else row.TYPE_MESSAGE
                row.type_name = f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
