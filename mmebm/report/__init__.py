"""A run as one HTML page that needs nothing else: no network, no script, pictures inside; and several runs compared.

page       HTML by construction: everything that is not an element is escaped
pictures   what is drawn from a run's networks
verdict    what a run is worth, by rules that the page states
glossary   the words of a report
sections   what the page says of a run, and what it says is missing
compare    the page of several runs
"""

from mmebm.report.compare import write_comparison
from mmebm.report.sections import write_report

__all__ = ["write_comparison", "write_report"]
