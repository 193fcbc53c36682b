"""The simulator of switching: fleets, catalogs and arrivals in virtual time, over the gateway's own ``step``."""
