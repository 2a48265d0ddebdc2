"""What every test runs under: a fixed plan, so that results have the same bits each time, and no cache of times."""

import os

os.environ["GRANET_PLAN"] = "native"
os.environ["GRANET_PLAN_CACHE"] = ""
