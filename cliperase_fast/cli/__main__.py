import sys

from cliperase_fast.cli.running import main

sys.exit(main())
