"""A run as one HTML page that needs nothing else: no network, no script, pictures inside.

page       HTML by construction: everything that is not an element is escaped
pictures   what is drawn from a run's networks
sections   what the page says of a run, and what it says is missing
"""

from mmebm.report.sections import write_report

__all__ = ["write_report"]
