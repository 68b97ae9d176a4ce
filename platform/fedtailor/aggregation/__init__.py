"""How SHARED parameters of a cohort become one consensus."""
