from test_on_glue import Heard

from lablib.data.packages import DataError
from lablib.peft.on_gpu import on_gpu


@on_gpu("no GPU here")
def part(lab, device, count, data=True):
    """What it says."""
    if not data:
        raise DataError("no data here")
    lab.say(f"{count} on {device in ('cpu', 'cuda')}")


def test_a_part_runs_at_the_gpu_tier_alone_and_tells_why_not():
    for tier, options, told in (
        ("cpu", {}, "no GPU here"),
        ("gpu", {}, "3 on True"),
        ("gpu", {"data": False}, "no data here"),
    ):
        part(lab := Heard(tier), 3, **options)
        assert lab.said == [told]
    assert part.__doc__ == "What it says."
