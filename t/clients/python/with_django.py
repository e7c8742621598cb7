"""Django: models on the view and on the buffer, migrations, and its tests.

With the argument "test", it makes a database of its own, runs the migrations
and shop/tests.py in it, and drops it."""

import os
import sys

import django
from django.conf import settings

settings.configure(
    INSTALLED_APPS=['shop'],
    DEFAULT_AUTO_FIELD='django.db.models.AutoField',
    DATABASES={'default': {
        'ENGINE': 'django.db.backends.postgresql',
        'NAME': os.environ['PGDATABASE'],
        'USER': os.environ['PGUSER'],
        'HOST': os.environ['PGHOST'],
        'PORT': os.environ['PGPORT'],
    }})
django.setup()

from django.core.management import call_command
from django.db import connection, transaction
from django.db.models import F
from django.db.utils import NotSupportedError

from seen import seen
from shop.models import Article, Hit

ME = 'django'


def value(statement, *parameters):
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchone()[0]


def test():
    from django.test.utils import get_runner

    seen('failures', get_runner(settings)(verbosity=0).run_tests(['shop']))
    with open(os.devnull, 'w') as nowhere:
        # are there changes in the models that a migration should make?
        call_command('makemigrations', 'shop', check=True, dry_run=True, stdout=nowhere)
    seen('migrations', 'complete')


def count():
    seen('version', django.get_version())

    # One.
    value("SELECT sb_increment(%s, buffer => 'hits')", f'{ME}/one')
    Hit.objects.create(path=f'{ME}/one')

    # A thousand.
    Hit.objects.bulk_create([Hit(path=f'{ME}/thousand') for _ in range(900)])
    with transaction.atomic():
        for _ in range(100):
            Hit(path=f'{ME}/thousand').save(force_insert=True)

    # save() tries an UPDATE first, because the object has a primary key.
    try:
        with transaction.atomic():
            Hit(path=f'{ME}/saved').save()
    except NotSupportedError as error:
        seen('save', str(error).split('\n')[0])

    # A key of two columns: models have one column for the key.
    with connection.cursor() as cursor:
        cursor.execute('INSERT INTO visit_counts VALUES (%s, %s)', [7, ME])
        cursor.execute("SELECT sb_increment(%s, 1, 'visit_counts')", [f'(7,{ME})'])

    # Rolled back, and not.
    with transaction.atomic():
        value("SELECT sb_increment(%s, 100, 'hits')", f'{ME}/rollback')
        value("SELECT sb_async_increment(%s, 1, 'hits')", f'{ME}/rollback')
        transaction.set_rollback(True)
    with transaction.atomic():
        Hit.objects.create(path=f'{ME}/savepoint')
        with transaction.atomic():
            Hit.objects.create(path=f'{ME}/savepoint', views=100)
            transaction.set_rollback(True)
        Hit.objects.create(path=f'{ME}/savepoint')

    seen('total', value("SELECT sb_total(%s, 'hits')", f'{ME}/one'))

    # The view.
    article = Article.objects.create(title=ME)
    seen('rows', Article.objects.filter(pk=article.pk).update(views=F('views') + 1))
    article.views = F('views') + 1
    article.save(update_fields=['views'])
    article.refresh_from_db()
    article.views = F('views') + 1
    article.save()
    article.refresh_from_db()
    seen('verb', article.views)

    # Others count between the read and the save: without F(), what is saved is
    # an absolute value.
    another = Article.objects.create(title=f'{ME} computes')
    Article.objects.filter(pk=another.pk).update(views=F('views') + 10)
    another.views += 1
    another.save()
    another.refresh_from_db()
    seen('computed', another.views)
    locked = None
    with transaction.atomic():
        locked = Article.objects.select_for_update().get(pk=another.pk)
        locked.title = f'{ME} renames'
        locked.save(update_fields=['title'])
    seen('renamed', Article.objects.filter(title=f'{ME} renames', views=another.views).count())
    seen('deleted', another.delete()[0])
    seen('found', Article.objects.get_or_create(title=ME)[1])


test() if sys.argv[1:] == ['test'] else count()
