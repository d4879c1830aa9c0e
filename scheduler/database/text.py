"""The roles of a lab's database and new passwords, for a terminal."""

from __future__ import annotations

from loractl.common.store.roles import RolesDone


def roles(answer: RolesDone) -> str:
    """What was done, and each new password, in the URL that its owner needs."""
    made = f"New roles: {', '.join(answer.new_roles)}." if answer.new_roles else "The roles already existed."
    lines = [f"{made} Their rights are those of revision {answer.revision}."]
    for login in answer.logins:
        how = "is a new login" if login.new else "is there" if login.url is None else "has a new password"
        lines.append(f"{login.name} {how}, with the role {login.role}." + ("" if login.url else " Its password stays."))
        lines += [f"    LORACTL_DATABASE_URL={login.url}"] if login.url else []
    if any(login.url for login in answer.logins):
        lines.append("No password is shown again.")
    return "\n".join(lines)
