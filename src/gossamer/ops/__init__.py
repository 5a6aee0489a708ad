"""Operations on sparse data: for each a plain reference, a compiled backend and a dispatch."""
