from pathlib import Path

import numpy as np
import pytest

from data_pipeline.encode.codecs import ImageSize, divided
from data_pipeline.prepare.buckets import bucket_resolutions, nearest_buckets
from data_pipeline.prepare.plan import plans_of_rank, shard_plans
from data_pipeline.prepare.ranks import Rank
from data_pipeline.prepare.survey import Catalog, survey
from data_pipeline.sources.items import source_identity
from sharpmoe.errors import DataError
from tests.fixtures_data import ShapesSource


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    source = ShapesSource(60, sides=((1, 1), (1, 2), (2, 1)))
    _, digests = source_identity(source, source.units())
    survey(source, tmp_path, digests, Rank(), read_sizes=True, threads=1)
    return Catalog(tmp_path, digests)


def latent_shape(image_size: ImageSize) -> tuple[int, int, int]:
    return 4, *divided(image_size, 4, "toy")


def test_every_picture_is_in_one_shard_of_its_split_and_bucket(catalog: Catalog) -> None:
    resolutions = bucket_resolutions("32x32,24x48,48x24", 32, 2, latent_shape)
    chosen = nearest_buckets(catalog.pixels, resolutions)
    plans = shard_plans(catalog, resolutions, chosen, 7)
    assert sorted(int(row) for plan in plans for row in plan.rows) == list(range(60))
    assert len({plan.name for plan in plans}) == len(plans)
    for plan in plans:
        assert 0 < len(plan.rows) <= 7
        assert {catalog.split_names[code] for code in catalog.split[plan.rows]} == {plan.split}
        assert {resolutions[number] for number in chosen[plan.rows]} == {plan.resolution}
        assert plan.name.startswith(f"{plan.split}-{plan.resolution.name}-")


def test_ranks_share_the_shards(catalog: Catalog) -> None:
    resolutions = bucket_resolutions("", 32, 2, latent_shape)
    plans = shard_plans(catalog, resolutions, np.zeros(60, np.int16), 5)
    dealt = [plans_of_rank(plans, Rank(rank, 3)) for rank in range(3)]
    assert sorted(plan.name for part in dealt for plan in part) == sorted(plan.name for plan in plans)
    assert max(len(part) for part in dealt) - min(len(part) for part in dealt) <= 1


@pytest.mark.parametrize("name", ["held out", "a/b", "unseen:1/2", "a:b", ""])
def test_a_split_that_no_reader_could_name_is_refused(catalog: Catalog, name: str) -> None:
    catalog.split_names[0] = name
    resolutions = bucket_resolutions("", 32, 2, latent_shape)
    with pytest.raises(DataError, match="a name of a split has no blanks"):
        shard_plans(catalog, resolutions, np.zeros(60, np.int16), 5)
