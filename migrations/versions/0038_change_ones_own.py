"""A person changes their own jobs, unless the lab is open (revision 0038). A lab that has jobs stays open."""

import importlib

import sqlalchemy as sa
from alembic import op

revision = "0038"
down_revision = "0037"
branch_labels = None
depends_on = None

_REFUSE_STRANGER = """
-- Raises where this person may not change a job of that user: only its user, the lab's owner, an operator that the
-- owner names, and in an open lab everybody, who with roles edits nobody else's job all the same. Without roles a name
-- is the client's word.
CREATE FUNCTION loractl_pending.refuse_stranger(number bigint, owner text, kind text, who text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, public, pg_temp AS $$
BEGIN
  IF who = owner OR loractl_login() IS NULL AND to_regrole('loractl_submit') IS NOT NULL OR
      EXISTS (SELECT FROM lab_settings WHERE
        name = 'changes' AND value = 'open' AND (kind <> 'edited' OR loractl_login() IS NULL) OR
        name = 'operators' AND who = ANY (string_to_array(value, ' '))) THEN
    RETURN;
  END IF;
  RAISE EXCEPTION 'job % is %''s: only %, an operator or the lab''s owner may % it', number, owner, owner,
    CASE kind WHEN 'cancelled' THEN 'cancel' WHEN 'held' THEN 'hold' WHEN 'edited' THEN 'edit' ELSE kind END
    USING ERRCODE = 'LR004';
END $$
"""
_IN_WANTED = 'PERFORM loractl_pending.refuse_stranger(before.job_id, before."user", asked.kind, asked.who);'
_IN_TAG = """PERFORM loractl_pending.refuse_stranger(job_id, "user", 'tag', left(coalesce(loractl_login(), who), 255))
    FROM jobs WHERE job_id IN (number, had);"""


_OF_PEOPLE = sa.text("attempt IS NULL AND kind IN ('cancel', 'cancelled', 'held', 'retry', 'edited')")


def upgrade() -> None:
    bind = op.get_bind()
    op.create_index("ix_events_of_people", "events", ["at"], sqlite_where=_OF_PEOPLE, postgresql_where=_OF_PEOPLE)
    known = sa.text("SELECT 1 FROM jobs WHERE NOT EXISTS (SELECT 1 FROM lab_settings WHERE name = 'changes') LIMIT 1")
    if bind.execute(known).scalar() is not None:
        settings = sa.table("lab_settings", *map(sa.column, ("name", "value", "set_by", "at")))
        op.execute(settings.insert().values(name="changes", value="open", set_by="db upgrade", at=sa.func.now()))
    if bind.dialect.name == "postgresql":
        bind.exec_driver_sql(_REFUSE_STRANGER.replace("%", "%%"))
        _write_functions(_IN_WANTED, _IN_TAG)


def downgrade() -> None:
    op.drop_index("ix_events_of_people", table_name="events")
    if op.get_bind().dialect.name == "postgresql":
        _write_functions("", "")
        op.execute("DROP FUNCTION loractl_pending.refuse_stranger")
    op.execute("DELETE FROM lab_settings WHERE name IN ('changes', 'operators')")


def _write_functions(in_wanted: str, in_tag: str) -> None:
    """The functions of 0035 that ask who may change a job, with what they ask."""
    earlier = importlib.import_module("loractl.migrations.versions.0035_change_at_commit")
    for statement, place, asked in (
        (earlier._WANTED, "PERFORM loractl_pending.refuse_flood(before.job_id);", in_wanted),
        (earlier._TAG, "PERFORM loractl_pending.refuse_flood(coalesce(number, had));", in_tag),
    ):
        written = statement.replace(place, f"{asked}\n  {place}").replace(
            "CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"
        )
        op.get_bind().exec_driver_sql(written.replace("%", "%%"))
