from .compilation_cache import use_compilation_cache as use_compilation_cache
from .cpu import keep_memory as keep_memory
from .devices import MappedStep as MappedStep, data_mesh as data_mesh, replicate as replicate
from .interruption import Interruption as Interruption
from .progress import Progress as Progress, say as say
