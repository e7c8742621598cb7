"""Alembic: what it makes of buffers and views when it compares the models with
the database, and a migration that makes a buffer."""

import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import orm

from seen import seen

Base = orm.declarative_base()


class PageView(Base):
    __tablename__ = 'page_views'
    path = sa.Column(sa.Text, primary_key=True)
    views = sa.Column(sa.BigInteger, nullable=False, server_default='0')


class Hit(Base):
    __tablename__ = 'hits'
    __table_args__ = {'info': {'is_external': True}}
    path = sa.Column(sa.Text, primary_key=True)
    views = sa.Column(sa.BigInteger, server_default='1')


class Article(Base):
    __tablename__ = 'article'
    __table_args__ = {'info': {'is_external': True}}
    id = sa.Column(sa.Integer, primary_key=True)
    title = sa.Column(sa.Text, nullable=False)
    views = sa.Column(sa.BigInteger, server_default='0')


def include_object(item, name, kind, reflected, compared_to):
    """As env.py passes it: these are made by migrations that are written."""
    return not (kind == 'table' and item.info.get('is_external'))


def differences(db, metadata, **options):
    context = MigrationContext.configure(db, opts=options)
    return ', '.join(sorted(
        f'{d[0]} {d[1].name}' for d in compare_metadata(context, metadata)
        if d[1].name in ('page_views', 'hits', 'article'))) or 'none'


engine = sa.create_engine('postgresql+psycopg2://')
with engine.connect() as db:
    seen('without', differences(db, Base.metadata))
    seen('with', differences(db, Base.metadata, include_object=include_object))
    # a database whose models do not know the buffer and the view
    only_tables = sa.MetaData()
    PageView.__table__.to_metadata(only_tables)
    seen('unknown', differences(db, only_tables))

with engine.begin() as db:
    op = Operations(MigrationContext.configure(db))
    op.create_table('clicks', sa.Column('link', sa.Text, primary_key=True),
                    sa.Column('clicks', sa.BigInteger, nullable=False, server_default='0'))
    op.execute("SELECT sb_create('click_counts', 'clicks', 'clicks')")
    op.execute("INSERT INTO click_counts VALUES ('/made')")
with engine.begin() as db:
    seen('made', db.scalar(sa.text("SELECT sb_total('/made', 'click_counts')")))

# And back down.
with engine.begin() as db:
    op = Operations(MigrationContext.configure(db))
    op.execute('DROP FOREIGN TABLE click_counts')
    op.drop_table('clicks')
    seen('dropped', db.scalar(sa.text("SELECT to_regclass('clicks') IS NULL")))
