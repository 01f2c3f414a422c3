"""A model of one operator as an ONNX file, written without the package `onnx`: protocol buffers by hand."""


def _number(value: int) -> bytes:
    low = bytes([value & 0x7F])
    return low if value < 0x80 else bytes([low[0] | 0x80]) + _number(value >> 7)


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    return _number(number << 3 | 2) + _number(len(value)) + value


def _tensor(name: bytes, shape: tuple[int, ...]) -> bytes:
    """Return a ValueInfoProto of float32."""
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, 1) + _field(2, dims)))


def sigmoid_model(count: int, size: int) -> bytes:
    """Return a model that maps (count, 3, size, size) to its sigmoid."""
    shape = (count, 3, size, size)
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Sigmoid")
    graph = _field(1, node) + _field(2, b"g") + _field(11, _tensor(b"x", shape)) + _field(12, _tensor(b"y", shape))
    return _field(1, 8) + _field(7, graph) + _field(8, _field(2, 13))
