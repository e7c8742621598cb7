"""What an application's tests can see.

TestCase runs each test in a transaction that is rolled back: nothing is
published, and there is nothing to drain.  sb_total() and the view have what the
transaction itself has counted.  TransactionTestCase commits."""

from django.db import connection
from django.db.models import F
from django.test import TestCase, TransactionTestCase

from shop.models import Article, Hit


def value(statement, *parameters):
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchone()[0]


class InATransaction(TestCase):
    @classmethod
    def setUpTestData(cls):
        Article.objects.create(title='of the class')

    def count(self):
        self.assertEqual(value("SELECT sb_total('/home', 'hits')"), 0)
        Hit.objects.create(path='/home')
        self.assertEqual(value("SELECT sb_total('/home', 'hits')"), 1)
        article = Article.objects.get(title='of the class')
        self.assertEqual(article.views, 0)
        Article.objects.filter(pk=article.pk).update(views=F('views') + 5)
        article.refresh_from_db()
        self.assertEqual(article.views, 5)

    # Each begins with nothing counted.
    def test_one(self):
        self.count()

    def test_two(self):
        self.count()

    def test_drain(self):
        Hit.objects.create(path='/home')
        self.assertTrue(value("SELECT sb_drain('hits')"))
        self.assertEqual(value("SELECT count(*) FROM page_views"), 0)


class Committed(TransactionTestCase):
    # Django empties the tables of its own models only.
    def setUp(self):
        with connection.cursor() as cursor:
            cursor.execute('TRUNCATE hits, page_views')

    def count(self):
        Hit.objects.create(path='/home')
        Hit.objects.create(path='/home', views=10)
        self.assertTrue(value("SELECT sb_drain('hits')"))
        self.assertEqual(value("SELECT views FROM page_views WHERE path = '/home'"), 11)
        Hit.objects.create(path='/home')

    # Each begins with nothing counted.
    def test_one(self):
        self.count()

    def test_two(self):
        self.count()
