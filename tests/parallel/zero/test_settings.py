"""What the limits of ZeRO-3 cost a step is said where they are too low."""

from sharpmoe.parallel.zero.settings import regather_warnings


def test_limits_below_the_model_size_are_named() -> None:
    def warned(size: int, **limits: int) -> list[str]:
        zero = {"stage": 3} | {f"stage3_max_{name}": value for name, value in limits.items()}
        return regather_warnings({"zero_optimization": zero, "bf16": {"enabled": False}}, size, 18)

    (message,) = warned(2**20, live_parameters=2**19, reuse_distance=2**20)
    assert "stage3_max_live_parameters is 524288" in message
    assert "gathers 4 MiB up to 18 times" in message
    assert len(warned(2**20, live_parameters=0, reuse_distance=0)) == 2
    assert warned(2**20, live_parameters=2**20, reuse_distance=2**20) == []
    assert warned(2**20, live_parameters=0, reuse_distance=2**22) == []
    assert warned(2**20) == []
    assert regather_warnings({"zero_optimization": {"stage": 2}}, 2**20, 18) == []
