"""What a run trains for: one objective per file, each a subclass of :class:`~mutor_img.objectives.objective.Objective`.

Definitions, what papers leave open and what each costs stand in ``docs/objectives.md``.
"""
