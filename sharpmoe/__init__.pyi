from sharpmoe.api import RolloutLoss as RolloutLoss
from sharpmoe.api import batches as batches
from sharpmoe.api import finish_step as finish_step
from sharpmoe.api import load as load
from sharpmoe.api import open_shards as open_shards
from sharpmoe.api import rollout_loss as rollout_loss
from sharpmoe.api import sample as sample
from sharpmoe.api import save as save
from sharpmoe.errors import SharpMoEError as SharpMoEError
from sharpmoe.model.attach import attach as attach
from sharpmoe.model.published.load import load_pretrained as load_pretrained
from sharpmoe.sampling import SamplingStep as SamplingStep
from sharpmoe.train.callbacks import TrainingCallback as TrainingCallback
from sharpmoe.train.callbacks import TrainingEnd as TrainingEnd
from sharpmoe.train.callbacks import TrainingLook as TrainingLook
from sharpmoe.train.callbacks import TrainingSave as TrainingSave
from sharpmoe.train.callbacks import TrainingStep as TrainingStep
from sharpmoe.training import train_run as train_run

__version__: str
