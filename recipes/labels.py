"""Labels of tables and pictures as names of folders."""


def folder_name(label: str) -> str:
    return label.replace(",", "").replace(" ", "_")
