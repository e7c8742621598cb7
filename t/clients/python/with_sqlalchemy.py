"""SQLAlchemy: its core, tables that it reads from the database, and its ORM."""

import sqlalchemy as sa
from sqlalchemy import exc, func, orm

from seen import seen

ME = 'sqlalchemy'

engine = sa.create_engine('postgresql+psycopg2://', future=True)
seen('version', sa.__version__)

# Tables as they are found: a buffer is a foreign table, and the view is a view.
inspector = sa.inspect(engine)
seen('tables', ' '.join(sorted(inspector.get_table_names())))
seen('views', ' '.join(sorted(v for v in inspector.get_view_names() if not v.startswith('sb_'))))
seen('foreign tables', ' '.join(sorted(inspector.get_foreign_table_names())))
found = sa.MetaData()
hits = sa.Table('hits', found, autoload_with=engine)
visits = sa.Table('visit_counts', found, autoload_with=engine)
seen('columns', ', '.join(f'{c.name} {c.type} {"NULL" if c.nullable else "NOT NULL"}' for c in hits.columns))
article = sa.Table('article', found, sa.Column('id', sa.Integer, primary_key=True), autoload_with=engine)

# One, by the core.
with engine.begin() as db:
    db.execute(sa.select(func.sb_increment(f'{ME}/one', 1, 'hits')))
    db.execute(hits.insert().values(path=f'{ME}/one'))

# A thousand.
with engine.begin() as db:
    db.execute(hits.insert(), [{'path': f'{ME}/thousand'}] * 500)
    db.execute(hits.insert().values([{'path': f'{ME}/thousand'}] * 500))

# A key of two columns.
with engine.begin() as db:
    db.execute(visits.insert().values(page=7, lang=ME))
    db.execute(sa.select(func.sb_increment(f'(7,{ME})', 1, 'visit_counts')))

# Rolled back, and not.
with engine.connect() as db:
    db.execute(sa.select(func.sb_increment(f'{ME}/rollback', 100, 'hits')))
    db.execute(sa.select(func.sb_async_increment(f'{ME}/rollback', 1, 'hits')))
    db.rollback()
    db.execute(hits.insert().values(path=f'{ME}/savepoint'))
    savepoint = db.begin_nested()
    db.execute(hits.insert().values(path=f'{ME}/savepoint', views=100))
    savepoint.rollback()
    db.execute(hits.insert().values(path=f'{ME}/savepoint'))
    db.commit()
    seen('total', db.scalar(sa.select(func.sb_total(f'{ME}/one', 'hits'))))

# --- the ORM ----------------------------------------------------------------

Base = orm.declarative_base()


# The view has no primary key, so the model says what it is.
class Article(Base):
    __tablename__ = 'article'
    id = sa.Column(sa.Integer, primary_key=True)
    title = sa.Column(sa.Text, nullable=False)
    views = sa.Column(sa.BigInteger, server_default='0')


# So does that of a buffer.
class Hit(Base):
    __tablename__ = 'hits'
    path = sa.Column(sa.Text, primary_key=True)
    views = sa.Column(sa.BigInteger, server_default='1')


with orm.Session(engine, future=True) as session:
    one = Article(title=ME)
    session.add(one)
    session.commit()
    # an attribute that is set to an expression, a statement, and the core
    one.views = Article.views + 1
    session.commit()
    session.execute(sa.update(Article).where(Article.id == one.id).values(views=Article.views + 1))
    session.commit()
    seen('rows', session.execute(
        article.update().where(article.c.id == one.id).values(views=article.c.views + 1)).rowcount)
    session.commit()
    session.refresh(one)
    seen('verb', one.views)

# What the application computes itself is what the user wanted only as long as
# nobody else counts.
with orm.Session(engine, future=True) as session:
    another = Article(title=f'{ME} computes')
    session.add(another)
    session.commit()
    seen('read', another.views)
    with engine.begin() as db:
        db.execute(sa.text('UPDATE article SET views = views + 10 WHERE id = :id'), {'id': another.id})
    another.views += 1
    session.commit()
    seen('computed', another.views)
    seen('deleted', (session.delete(another), session.commit())[1] is None)

# The buffer as a model: each object is an increment, and is not looked at again.
with orm.Session(engine, future=True) as session:
    session.add(Hit(path=f'{ME}/orm'))
    session.commit()
with orm.Session(engine, future=True) as session:
    session.add(Hit(path=f'{ME}/orm', views=10))
    session.bulk_insert_mappings(Hit, [{'path': f'{ME}/orm'}] * 5)
    session.commit()

# It cannot be updated.
with orm.Session(engine, future=True) as session:
    try:
        session.execute(sa.update(Hit).values(views=Hit.views + 1))
    except exc.SQLAlchemyError as error:
        seen('update', error.orig.pgcode)
