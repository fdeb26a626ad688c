"""Text and Markdown tables."""

from slim_utils.profiling.tables import markdown_table, side_by_side, text_table


def test_text_table_of_cells_of_different_lengths_is_aligned():
    table = text_table(("task", "acc", "stderr"), [("arc_easy", "60.00*", "-"), ("mean", "5.00")], widths=(0, 7))
    assert table.splitlines() == [
        "task          acc  stderr",
        "arc_easy   60.00*       -",
        "mean         5.00",
    ]


def test_text_table_without_headers_has_rows_alone():
    assert text_table((), [("a", "1"), ("bb", "22")]) == "a    1\nbb  22"


def test_side_by_side_has_the_ratio_of_the_second_to_the_first():
    assert side_by_side([("seconds", 4.0, 3.0)], ("dense", "pruned")).splitlines() == [
        "             dense     pruned   ratio",
        "seconds       4.00       3.00   0.750",
    ]


def test_side_by_side_of_three_has_two_ratios():
    assert side_by_side([("perplexity", 10.0, 15.0, 12.0)], ("dense", "pruned", "recovered")).splitlines() == [
        "                dense     pruned   ratio  recovered   ratio",
        "perplexity      10.00      15.00   1.500      12.00   1.200",
    ]


def test_markdown_table_empty_heading_is_one_space_wide():
    assert markdown_table(("model", ""), [("a", 1), ("b", "")]) == "| model | |\n|---|---|\n| a | 1 |\n| b |  |"
