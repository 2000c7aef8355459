"""One model at many sizes: a sweep over budgets, what each of them costs, and the curve they make."""
