"""A model on the view, with the table's columns, and one on the buffer.

Django neither creates nor alters what is not "managed"."""

from django.db import models


class Article(models.Model):
    title = models.TextField()
    views = models.BigIntegerField(default=0)

    class Meta:
        managed = False
        db_table = 'article'


class Hit(models.Model):
    path = models.TextField(primary_key=True)
    views = models.BigIntegerField(default=1)

    class Meta:
        managed = False
        db_table = 'hits'
