"""What is tuned, and on what: base model, data, partition, prompt, metric."""

import logging

# PEFT imports bitsandbytes where it is installed, which then warns that a faster kernel is not, and
# in use at every product that LLM.int8() computes in float16. Both are so by design.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
